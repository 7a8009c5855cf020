"""What the service answers when it does not answer. Every class has a status; the body is always {"error": message}.

ServiceError
├── BadRequestError        400  malformed or invalid input
├── ForbiddenError         403  the operator's policy does not open it
├── NoRouteError           404  no such address, or 405: not with this method
├── UnknownEnsembleError   404  no ensemble of that name is served
├── SlowBodyError          408  the body stopped coming
├── TooLargeError          413  the body or the batch is over its limit
├── MediaTypeError         415  a body that is not one of ours
├── MisdirectedError       421  a Host that is not this service's
├── TooLargeHeadersError   431  the request's head is over its limit
├── QueueFullError         429  more work is waiting than can be done in time
├── BrokenEnsembleError    500  a member failed, or gave NaN
├── NotImplementedHereError 501  a transfer coding that is not read here
├── NotReadyError          503  nothing to serve yet
├── BusyError              503  more bytes are held than the limit allows
├── StoppingError          503  the service is about to end
├── QueueTimeError         503  the request waited too long for its turn
└── DeadlineError          504  the whole took too long
"""

from __future__ import annotations

from models_store.errors import ModepathError


class ServiceError(ModepathError):
    """Refused, with a status and a message that says what was wrong, the likely cause, and what to do."""

    status: int = 500
    reason: str = "internal"  # label of the metric refused_total
    retry_after: int | None = None  # seconds


class BadRequestError(ServiceError):
    """Malformed or invalid input."""

    status = 400
    reason = "bad_request"


class ForbiddenError(ServiceError):
    """The operator's policy does not open it."""

    status = 403
    reason = "forbidden"


class NoRouteError(ServiceError):
    """No such address, or not with this method."""

    status = 404
    reason = "no_route"


class UnknownEnsembleError(ServiceError):
    """No ensemble of that name is served."""

    status = 404
    reason = "unknown_ensemble"


class SlowBodyError(ServiceError):
    """The body stopped coming."""

    status = 408
    reason = "slow_body"


class TooLargeError(ServiceError):
    """The body or the batch is over its limit."""

    status = 413
    reason = "too_large"


class MediaTypeError(ServiceError):
    """A body that is not one of ours."""

    status = 415
    reason = "media_type"


class MisdirectedError(ServiceError):
    """A Host that is not this service's."""

    status = 421
    reason = "misdirected"


class TooLargeHeadersError(ServiceError):
    """The request's head is over its limit."""

    status = 431
    reason = "headers_too_large"


class QueueFullError(ServiceError):
    """More work is waiting than can be done in time."""

    status = 429
    reason = "queue_full"
    retry_after = 1


class BrokenEnsembleError(ServiceError):
    """A member failed, or gave NaN."""

    status = 500
    reason = "broken_ensemble"


class NotImplementedHereError(ServiceError):
    """A transfer coding that is not read here."""

    status = 501
    reason = "not_implemented"


class NotReadyError(ServiceError):
    """Nothing to serve yet."""

    status = 503
    reason = "not_ready"
    retry_after = 2


class BusyError(ServiceError):
    """More bytes are held than the limit allows."""

    status = 503
    reason = "busy"
    retry_after = 1


class StoppingError(ServiceError):
    """The service is about to end."""

    status = 503
    reason = "stopping"
    retry_after = 1


class QueueTimeError(ServiceError):
    """The request waited too long for its turn."""

    status = 503
    reason = "queue_time"
    retry_after = 1


class DeadlineError(ServiceError):
    """The whole took too long."""

    status = 504
    reason = "deadline"
