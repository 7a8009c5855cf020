"""POST /ensembles/{name}/activate, and /ensembles/{name}/rollout: which versions of an ensemble answer.

Both need a key with the scope admin.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models_store.errors import EnsembleNotFoundError, InvalidNameError, StoreError
from models_store.records.rollout import RollOut, Rule, Whole
from models_store.store import Store
from service.http.errors import BadRequestError, ConflictError, MediaTypeError, StoreFaultError, UnknownEnsembleError
from service.inference.rollout import Tally

_Shape = TypeVar("_Shape", bound=BaseModel)


class Activation(BaseModel):
    """The JSON body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Whole = Field(ge=1, le=10**9, description="the published version to serve")


class Plan(BaseModel):
    """The JSON body of PUT /ensembles/{name}/rollout."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "anyOf": [{"required": [one], "properties": {one: {"exclusiveMinimum": 0}}} for one in ("share", "shadow")]
        },
    )

    version: Whole = Field(ge=1, le=10**9, description="the published version that becomes the canary")
    share: float = Field(default=0.0, ge=0, le=1, description="share of the callers that it answers")
    shadow: float = Field(
        default=0.0, ge=0, le=1, description="share of the requests that both versions compute, to be compared"
    )
    rule: Rule = Rule()


class RollOutInfo(BaseModel):
    """The answer of /ensembles/{name}/rollout. The numbers are those of this service since it started."""

    ensemble: str
    canary: int | None = Field(description="the version; null without a roll-out")
    share: float | None = Field(description="share of the callers that it answers")
    shadow: float | None = Field(description="share of the requests for which it is compared with the active version")
    rule: Rule | None = Field(description="when it is rolled back")
    ended: str | None = Field(description="why it was rolled back; null while it goes on")
    requests: int = Field(description="requests that it computed, to answer or to be compared")
    failures: int = Field(description="of these, those that it failed; the active version answered them")
    rows: int = Field(description="rows for which it was compared")
    different: int = Field(description="of these, those that it labelled differently")

    @classmethod
    def of(cls, ensemble: str, plan: RollOut | None, tally: Tally | None) -> RollOutInfo:
        """Describe a roll-out."""
        counted = tally or Tally()
        return cls(
            ensemble=ensemble,
            canary=plan and plan.version,
            share=plan and plan.share,
            shadow=plan and plan.shadow,
            rule=plan and plan.rule,
            ended=plan and plan.ended,
            requests=int(counted.requests),
            failures=int(counted.failures),
            rows=int(counted.rows),
            different=int(counted.different),
        )


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
    return _parsed(Activation, content_type, body, '{"version": 3}')


def parse_roll_out(content_type: str, body: bytes) -> RollOut:
    """Read the body of a roll-out; raises as `parse` does."""
    plan = _parsed(Plan, content_type, body, '{"version": 3, "share": 0.05, "shadow": 0.1}')
    try:
        return RollOut(**{field: getattr(plan, field) for field in Plan.model_fields})
    except ValidationError as error:
        raise BadRequestError(f"{error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None


def _parsed(shape: type[_Shape], content_type: str, body: bytes, example: str) -> _Shape:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise MediaTypeError(f"Send application/json: {example}.")
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise BadRequestError(f"{f'{where}: ' if where else ''}{first['msg']}. Send for example {example}.") from None


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


def begin_roll_out(store: Store, name: str, plan: RollOut) -> None:
    """Make a version the canary of an ensemble.

    Raises:
        UnknownEnsembleError: it is not published, or the ensemble has no active version.
        ConflictError: it is the active version, or takes other inputs.
        StoreFaultError: the store cannot be read or written, or a version is damaged.
    """
    try:
        store.begin_roll_out(name, plan)
    except (EnsembleNotFoundError, InvalidNameError):
        raise UnknownEnsembleError(
            f"{name[:80]!r} has no published version {plan.version}, or no active version that it could be compared with."
        ) from None
    except StoreError as error:
        raise _fault(error, "The roll-out did not begin") from error


def end_roll_out(store: Store, name: str) -> None:
    """End the roll-out of an ensemble, if there is one; raises as `begin_roll_out` does."""
    _check_known(store, name)
    try:
        store.end_roll_out(name)
    except StoreError as error:
        raise _fault(error, "The roll-out goes on") from error


def read_roll_out(store: Store, name: str) -> RollOut | None:
    """The roll-out of an ensemble; raises as `begin_roll_out` does."""
    _check_known(store, name)
    try:
        return store.roll_out(name)
    except StoreError as error:
        raise _fault(error, "The roll-out cannot be read") from error


def _check_known(store: Store, name: str) -> None:
    try:
        known = bool(store.versions(name))
    except InvalidNameError:
        known = False
    except StoreError as error:
        raise _fault(error, "The store cannot be read") from error
    if not known:
        raise UnknownEnsembleError(
            f"The store has no ensemble {name[:80]!r}. GET /ensembles lists those that are served."
        )


def _fault(error: StoreError, what: str) -> ConflictError | StoreFaultError:
    """A refusal by the rules of the store is the client's; a store that cannot be used, or is damaged, is not."""
    if type(error) is StoreError:
        return ConflictError(str(error))
    return StoreFaultError(f"{what} ({type(error).__name__}). The operator's log has the reason.")
