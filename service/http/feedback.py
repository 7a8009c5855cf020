"""POST /feedback: labels that become known after the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.feedback.database import Label, Outcome
from service.http.errors import BadRequestError, NoFeedbackError, TooLargeError

MOST_LABELS = 10_000  # of one request
EXAMPLE = '{"request_id": "…", "row": 0, "label": 3}'
Reason = Literal["duplicate", "unknown", "expired", "row", "label", "name", "malformed"]


class Feedback(BaseModel):
    """The true class of one image of an earlier request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request_id: Annotated[str, Field(min_length=1, max_length=64, description="the `request_id` of the answer")]
    row: Annotated[int, Field(ge=0, lt=2**31, description="which image of that request, from 0")] = 0
    label: int | str = Field(
        description="index of the true class, or its name while the version that answered is served"
    )


class Rejected(BaseModel):
    """A label that was not counted."""

    index: int = Field(description="position in the list that was sent")
    reason: Reason
    error: str = Field(description="what was wrong, and what to do")


class FeedbackResponse(BaseModel):
    """The answer to POST /feedback."""

    accepted: int = Field(description="number of labels that were stored and counted")
    rejected: list[Rejected] = Field(description="the others")


_one: TypeAdapter[Feedback] = TypeAdapter(Feedback)
_STATUS: dict[str, int] = {
    "duplicate": 409,
    "unknown": 404,
    "expired": 410,
    "row": 400,
    "label": 400,
    "name": 400,
    "malformed": 400,
}
_WHY: dict[Outcome, str] = {
    "duplicate": "A label for this row was counted before. The first one stays.",
    "unknown": "No answer of this service has this request_id. Send the `request_id` of the answer of POST /predict.",
    "expired": "This answer is older than the service keeps answers (MODEPATH_FEEDBACK_DAYS).",
    "row": "The request had fewer images. Rows are numbered from 0.",
    "label": "The ensemble has fewer classes. Labels are numbered from 0.",
    "name": "This is not the name of a class, or the version that gave the answer is not served any more. Send the index of the class.",
}


def parse(body: bytes) -> tuple[list[Label | Rejected], bool]:
    """Read a label or a list of labels.

    Args:
        body: the body as received.

    Returns:
        A label, or the reason why it is malformed, for each entry; and whether the body was a list.

    Raises:
        BadRequestError: the body is not JSON, or neither an object nor a list.
        TooLargeError: the list is too long.
    """
    try:
        record: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"The body is not JSON ({error}); send {EXAMPLE}, or a list of such objects.") from None
    several = isinstance(record, list)
    if not several and not isinstance(record, dict):
        kind = type(cast("object", record)).__name__
        raise BadRequestError(f"The body is a JSON {kind}; send {EXAMPLE}, or a list of such objects.")
    entries: list[Any] = cast("list[Any]", record) if several else [cast("Any", record)]
    if len(entries) > MOST_LABELS:
        raise TooLargeError(f"{len(entries)} labels; send at most {MOST_LABELS} at a time.")
    return [_read(index, entry) for index, entry in enumerate(entries)], several


def _read(index: int, entry: Any) -> Label | Rejected:
    try:
        found = _one.validate_python(entry)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80] or "the entry"
        return Rejected(index=index, reason="malformed", error=f"{place}: {first['msg']}. Send {EXAMPLE}.")
    return Label(found.request_id, found.row, found.label)


def response(entries: Sequence[Label | Rejected], outcomes: Sequence[Outcome], *, several: bool) -> FeedbackResponse:
    """Return the response from what became of the labels, in their order.

    Raises:
        NoFeedbackError: it was one label, not a list, and it was rejected.
        BadRequestError: the same, and it was malformed.
    """
    left = iter(outcomes)
    rejected: list[Rejected] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Rejected):
            rejected.append(entry)
        elif (outcome := next(left)) != "accepted":
            rejected.append(Rejected(index=index, reason=cast(Reason, outcome), error=_WHY[outcome]))
    if rejected and not several:
        if _STATUS[rejected[0].reason] == 400:
            raise BadRequestError(rejected[0].error)
        raise NoFeedbackError(rejected[0].error, _STATUS[rejected[0].reason])
    return FeedbackResponse(accepted=len(entries) - len(rejected), rejected=rejected)
