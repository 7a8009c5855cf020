"""The errors that refuse a request. Every class has an HTTP status; the body is always {"error": message}.

ServiceError
├── BadRequestError        400  malformed or invalid input
├── UnauthorizedError      401  no API key, or one that is not known
├── ForbiddenError         403  not allowed by the operator's policy, or by the scope of the key
├── NoRouteError           404  unknown path, or 405: the path does not have this method
├── UnknownEnsembleError   404  no ensemble of that name is served
├── NoFeedbackError        404  feedback is switched off, or the answer is unknown; 409: it is counted already; 410: it has expired
├── ConflictError          409  the version cannot be a canary of what is active
├── SlowBodyError          408  the body arrived too slowly
├── TooLargeError          413  the body or the batch is over its limit
├── MediaTypeError         415  the media type of the body is not supported
├── MisdirectedError       421  the Host header names another host
├── TooLargeHeadersError   431  the head of the request is over its limit
├── QueueFullError         429  more work is waiting than can be done in time
├── QuotaError             429  the key has used its quota of rows up
├── BrokenEnsembleError    500  a member failed, or returned NaN
├── NotImplementedHereError 501  the transfer coding is not supported
├── NotReadyError          503  no ensemble can answer yet
├── FeedbackError          503  the database of answers cannot be reached
├── StoreFaultError        503  the store cannot be written
├── BusyError              503  the limit on held bytes or open connections is reached
├── StoppingError          503  the service is shutting down
├── QueueTimeError         503  the request waited too long for its turn
└── DeadlineError          504  the request as a whole took too long
"""

from __future__ import annotations

from models_store.errors import ModepathError


class ServiceError(ModepathError):
    """Refuses a request. The message states what was wrong, the likely cause, and what to do."""

    status: int = 500  # HTTP status
    reason: str = "internal"  # label of the metric refused_total
    retry_after: int | None = None  # seconds, for the header Retry-After
    challenge: str | None = None  # for the header WWW-Authenticate


class BadRequestError(ServiceError):
    """Malformed or invalid input."""

    status = 400
    reason = "bad_request"


class UnauthorizedError(ServiceError):
    """The request has no API key, or one that is not known."""

    status = 401
    reason = "unauthorized"

    def __init__(self, message: str, *, page: bool = False):
        """With `page`, a browser asks the person in front of it for the key, as a password."""
        super().__init__(message)
        self.challenge = 'Basic realm="modepath: the key is the password", charset="UTF-8"' if page else "Bearer"


class ForbiddenError(ServiceError):
    """The operator's policy, or the scope of the key, does not allow the request."""

    status = 403
    reason = "forbidden"


class NoRouteError(ServiceError):
    """The path is unknown, or does not have this method."""

    status = 404
    reason = "no_route"


class UnknownEnsembleError(ServiceError):
    """No ensemble of that name is served."""

    status = 404
    reason = "unknown_ensemble"


class NoFeedbackError(ServiceError):
    """Feedback is switched off, or a single label is rejected."""

    status = 404
    reason = "no_feedback"

    def __init__(self, message: str, status: int = 404):
        """Refuse with another status: 409 for a label that was counted already, 410 for an answer that has expired."""
        super().__init__(message)
        self.status = status


class ConflictError(ServiceError):
    """What is asked does not fit what is active."""

    status = 409
    reason = "conflict"


class SlowBodyError(ServiceError):
    """The body arrived too slowly."""

    status = 408
    reason = "slow_body"


class TooLargeError(ServiceError):
    """The body or the batch is over its limit."""

    status = 413
    reason = "too_large"


class MediaTypeError(ServiceError):
    """The media type of the body is not supported."""

    status = 415
    reason = "media_type"


class MisdirectedError(ServiceError):
    """The Host header names a host that this service does not answer for."""

    status = 421
    reason = "misdirected"


class TooLargeHeadersError(ServiceError):
    """The head of the request is over its limit."""

    status = 431
    reason = "headers_too_large"


class QueueFullError(ServiceError):
    """More work is waiting than can be done in time."""

    status = 429
    reason = "queue_full"
    retry_after = 1


class QuotaError(ServiceError):
    """The key has used its quota of rows up."""

    status = 429
    reason = "quota"

    def __init__(self, message: str, seconds: int):
        """Refuse for so many seconds."""
        super().__init__(message)
        self.retry_after = seconds


class BrokenEnsembleError(ServiceError):
    """A member failed, or returned NaN."""

    status = 500
    reason = "broken_ensemble"


class NotImplementedHereError(ServiceError):
    """The transfer coding is not supported."""

    status = 501
    reason = "not_implemented"


class NotReadyError(ServiceError):
    """No ensemble can answer yet."""

    status = 503
    reason = "not_ready"
    retry_after = 2


class FeedbackError(ServiceError):
    """The database of answers cannot be reached."""

    status = 503
    reason = "feedback_database"
    retry_after = 5


class StoreFaultError(ServiceError):
    """The store cannot be written."""

    status = 503
    reason = "store"
    retry_after = 5


class BusyError(ServiceError):
    """The limit on held bytes or on open connections is reached."""

    status = 503
    reason = "busy"
    retry_after = 1


class StoppingError(ServiceError):
    """The service is shutting down."""

    status = 503
    reason = "stopping"
    retry_after = 1


class QueueTimeError(ServiceError):
    """The request waited too long for its turn."""

    status = 503
    reason = "queue_time"
    retry_after = 1


class DeadlineError(ServiceError):
    """The request as a whole took too long."""

    status = 504
    reason = "deadline"
