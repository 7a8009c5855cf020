"""What the service answers when it does not answer. Every class has a status; the body is always {"error": message}.

ServiceError
├── BadRequestError        400  malformed or invalid input
├── UnknownEnsembleError   404  no ensemble of that name is served
├── TooLargeError          413  the body or the batch is over its limit
├── MediaTypeError         415  a body that is not one of ours
└── NotReadyError          503  nothing to serve yet
"""


class ServiceError(Exception):
    """Refused, with a status and a message that says what was wrong, the likely cause, and what to do."""

    status: int = 500
    headers: dict[str, str] | None = None


class BadRequestError(ServiceError):
    """Malformed or invalid input."""

    status = 400


class UnknownEnsembleError(ServiceError):
    """No ensemble of that name is served."""

    status = 404


class TooLargeError(ServiceError):
    """The body or the batch is over its limit."""

    status = 413


class MediaTypeError(ServiceError):
    """A body that is not one of ours."""

    status = 415


class NotReadyError(ServiceError):
    """Nothing to serve yet."""

    status = 503
    headers = {"Retry-After": "2"}  # noqa: RUF012 - constant
