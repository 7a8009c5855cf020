"""What the operator lets clients ask of an ensemble, and what its answers show.

An ensemble without the mode `average` is *defended*: an attacker who could ask for the average beside it, or ask another ensemble that
shares its networks, would attack those instead. So the policy follows lineage: who shares networks with a defended ensemble is closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models_store.lineage import Marks, families

Mode = Literal["average", "random", "keyed"]
Digits = Annotated[int, Field(ge=1, le=6)]
DIGITS = 2  # of a single network's probabilities, where the policy does not say


class Policy(BaseModel):
    """Of one ensemble; a field that is not given is as open as its modes allow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    modes: tuple[Mode, ...] = Field(
        default=("average",), min_length=1, description="that are open; the first one answers when none is named"
    )
    probabilities: Literal["exact", "none"] | Digits | None = Field(
        default=None,
        description="exact, rounded to so many digits, or none: the label only (default: exact in `average`, else 2)",
    )
    uncertainty: bool | None = Field(
        default=None, description="in `average`: entropies and disagreement (default: where probabilities are exact)"
    )
    members: bool | None = Field(
        default=None, description="in `average`: each member's probabilities, when asked (default: likewise)"
    )
    point: bool = Field(default=False, description="in `random` and `keyed`: which network answered")

    @property
    def defended(self) -> bool:
        """True if `average` is closed, so that every answer comes from one network that is drawn for its query."""
        return "average" not in self.modes

    @property
    def shows_uncertainty(self) -> bool:
        """In `average`."""
        return self.digits("average") == "exact" and self.uncertainty is not False

    @property
    def shows_members(self) -> bool:
        """In `average`, when asked."""
        return self.digits("average") == "exact" and self.members is not False

    def hides(self, mode: Mode) -> bool:
        """True if histograms of each row would show more than the answers do: the change of a sum over one request is that request's value."""
        exact = self.digits(mode) == "exact" and (mode != "average" or self.shows_uncertainty)
        return self.defended or not exact

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.uncertainty or self.members) and self.digits("average") != "exact":
            raise ValueError(
                f"uncertainty and members are exact numbers, and probabilities are {self.probabilities}: they would show what that hides"
            )
        return self

    def digits(self, mode: Mode) -> Literal["exact", "none"] | int:
        """How probabilities are shown in a mode."""
        return self.probabilities or ("exact" if mode == "average" else DIGITS)


def of(name: str, policies: Mapping[str, Policy]) -> Policy:
    """The policy of an ensemble: its own, else that of `*`, else the average for everybody."""
    return policies.get(name) or policies.get("*") or Policy()


@dataclass(frozen=True, slots=True)
class Known:
    """What decides whether an ensemble may answer."""

    marks: Marks  # of the versions that answer or are about to; of a defended ensemble, of all its versions
    networks: int  # that a query may get
    whole: bool = True  # of a defended ensemble: could all of these versions be read?


@dataclass(frozen=True, slots=True)
class Closed:
    """Which ensembles answer nobody."""

    related: frozenset[str] = frozenset()  # they share networks with a defended one
    uncertain: frozenset[str] = frozenset()  # they may: a version of a defended one cannot be read


def closed(known: Mapping[str, Known], policies: Mapping[str, Policy]) -> Closed:
    """Which ensembles answer nobody, because they share networks with a defended one, or may do so.

    Of several defended relatives one answers, or whoever asks all of them would have several answers to one question: one that has a policy of its
    own before those that `*` defends, and of these the one with the most networks.

    Args:
        known: all that are published, loaded or not.
        policies: by name, and `*`.
    """
    defended = {name for name in known if of(name, policies).defended}
    named = defended & policies.keys()
    uncertain = set[str]() if all(known[name].whole for name in defended) else known.keys() - named
    related = set[str]()
    for family in families({name: one.marks for name, one in known.items()}):
        if among := family & named or family & defended:
            related |= family - {max(sorted(among), key=lambda name: known[name].networks)}
    return Closed(frozenset(related), frozenset(uncertain - related))


CLOSED = "The ensemble {!r} is not open here, by the operator's policy. GET /ensembles lists those that are."
UNCERTAIN = (
    "It cannot be determined at the moment which ensembles share networks with one that the operator defends, so only that one may answer. "
    "The operator's log says which version cannot be read, and what to do. Try again later."
)
