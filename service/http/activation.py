"""POST /ensembles/{name}/activate: serve another published version of an ensemble. It needs a key with the scope admin."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models_store.errors import EnsembleNotFoundError, InvalidNameError, StoreError
from models_store.store import Store
from service.http.errors import BadRequestError, MediaTypeError, StoreFaultError, UnknownEnsembleError


class Activation(BaseModel):
    """The JSON body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, le=10**9, description="the published version to serve")


class Activated(BaseModel):
    """The answer. Each worker serves the version as soon as it has loaded it; see `version` in answers."""

    ensemble: str
    version: int
    previous: int | None = Field(description="the version that was active before; null: none")


def parse(content_type: str, body: bytes) -> Activation:
    """Read the body.

    Raises:
        MediaTypeError: it is not JSON by its Content-Type.
        BadRequestError: it is not such a body.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise MediaTypeError('Send application/json: {"version": 3}.')
    try:
        return Activation.model_validate_json(body)
    except ValidationError as error:
        raise BadRequestError(
            f'{error.errors()[0]["msg"]}. Send {{"version": 3}}, the number of a published version.'
        ) from None


def activate(store: Store, name: str, version: int) -> Activated:
    """Activate a version.

    Raises:
        UnknownEnsembleError: it is not published.
        StoreFaultError: the store cannot be read or written, or the version is damaged.
    """
    try:
        try:
            previous = store.active(name)
        except EnsembleNotFoundError:
            previous = None
        store.activate(name, version)
    except (EnsembleNotFoundError, InvalidNameError):
        raise UnknownEnsembleError(
            f"{name[:80]!r} has no published version {version}. GET /ensembles/NAME/versions lists those of an ensemble that is served."
        ) from None
    except StoreError as error:
        raise StoreFaultError(
            f"The version was not activated ({type(error).__name__}). The operator's log has the reason."
        ) from error
    return Activated(ensemble=name, version=version, previous=previous)
