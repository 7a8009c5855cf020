"""Canaries: a new version beside the active one, the share of the callers that it answers, and when it is rolled back.

<root>/<name>/.rollout   the roll-out of an ensemble, as JSON; FORMAT.md specifies it

An activation ends the roll-out of its ensemble, whichever version it activates.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from models_store import files
from models_store.errors import CorruptionError

_FILE = ".rollout"
_BYTES = 2**16
_MISSING = (FileNotFoundError, NotADirectoryError)


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # JSON has one type of numbers: 3.0 is the integer 3


class Rule(BaseModel):
    """When a canary is rolled back. A limit that is null is not checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    errors: float | None = Field(
        default=0.01, ge=0, lt=1, description="largest share of its requests that the canary may fail"
    )
    disagreement: float | None = Field(
        default=0.2, ge=0, lt=1, description="largest share of compared rows that both versions may label differently"
    )
    slowdown: float | None = Field(
        default=3.0, gt=0, description="largest ratio of its time per row to that of the active version"
    )
    requests: Whole = Field(
        default=200,
        ge=1,
        le=10**9,
        description="requests, or compared rows, that the shares are judged on: a share is exceeded as soon as it would be even if all of the "
        "rest were good",
    )


class RollOut(BaseModel):
    """A canary: a new version that answers some of the callers, or is only compared with the active version."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Whole = Field(ge=1, description="the canary")
    share: float = Field(default=0.0, ge=0, le=1, description="share of the callers that it answers")
    shadow: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the requests that both versions compute, to be compared; the callers get only one answer",
    )
    rule: Rule = Rule()
    id: str = Field(
        default_factory=lambda: secrets.token_hex(4), pattern="^[0-9a-f]{8}$", description="identifies this roll-out"
    )
    ended: str | None = Field(default=None, description="why it was rolled back; null while it goes on")

    @model_validator(mode="after")
    def _does_something(self) -> RollOut:
        if not self.share and not self.shadow:
            raise ValueError("share and shadow are both 0, so the canary would neither answer nor be compared")
        return self


class RollOuts:
    """Reads and writes the roll-outs of one store. Writing requires the lock of activations."""

    def __init__(self, root: Path):
        self._root = root

    def read(self, name: str) -> RollOut | None:
        """The latest roll-out of `name`, also if it was rolled back; None if there is none.

        Raises:
            CorruptionError: the file is not a roll-out.
            StoreReadError: the file cannot be read.
        """
        file = self._root / name / _FILE
        try:
            with files.reading(file):
                content = files.read(file, _BYTES)
        except _MISSING:
            return None
        try:
            return RollOut.model_validate_json(content, strict=True)
        except ValidationError as error:
            raise CorruptionError(
                f"{file} is not a roll-out ({error.errors()[0]['msg']}). Run: python -m models_store rollout {name} --end"
            ) from None

    def write(self, name: str, one: RollOut) -> None:
        """Record a roll-out durably."""
        files.replace(self._root / name / _FILE, one.model_dump_json() + "\n")
        files.sync(self._root / name)

    def remove(self, name: str) -> None:
        """End the roll-out of `name` durably, if there is one."""
        files.clear(self._root / name / _FILE)
        try:
            (self._root / name / _FILE).unlink()
        except _MISSING:
            return
        files.sync(self._root / name)
