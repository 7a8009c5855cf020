"""Policies: which modes of an ensemble clients may use, and what its answers show.

An ensemble without the mode `average` is *defended*. If an attacker could also ask for the average, or query another
ensemble that shares its networks, the attacker would attack that instead. So the policy follows lineage: ensembles that
share networks with a defended ensemble are disabled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models_store.lineage import Marks, families

Mode = Literal["average", "cascade", "random", "keyed"]
TOGETHER: tuple[Mode, ...] = ("average", "cascade")  # modes in which several members answer one image
Digits = Annotated[int, Field(ge=1, le=6)]
DIGITS = 2  # default number of digits of a single network's probabilities


class Policy(BaseModel):
    """The policy of one ensemble. A field that is not set is as open as its modes allow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    modes: tuple[Mode, ...] = Field(
        default=("average",),
        min_length=1,
        description="modes that are open; the first one answers requests that name no mode",
    )
    probabilities: Literal["exact", "none"] | Digits | None = Field(
        default=None,
        description="how probabilities are shown: exact; a number of digits to round them to; or none, the label only (default: exact in "
        "`average`, else 2 digits)",
    )
    uncertainty: bool | None = Field(
        default=None, description="in `average`: show entropies and disagreement (default: if probabilities are exact)"
    )
    members: bool | None = Field(
        default=None,
        description="in `average`: show each member's probabilities on request (default: if probabilities are exact)",
    )
    risk: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the answers given that may be wrong, for all requests: every answer then says whether to rely on it. The version "
        "must be calibrated",
    )
    point: bool = Field(default=False, description="in `random` and `keyed`: show which network answered")

    @property
    def defended(self) -> bool:
        """True if `average` is closed, so that every answer comes from one network drawn for its query."""
        return "average" not in self.modes

    @property
    def shows_uncertainty(self) -> bool:
        """True if answers in `average` include the uncertainty."""
        return self.digits("average") == "exact" and self.uncertainty is not False

    @property
    def shows_members(self) -> bool:
        """True if answers in `average` include each member's probabilities on request."""
        return self.digits("average") == "exact" and self.members is not False

    def hides(self, mode: Mode) -> bool:
        """Return whether histograms over rows would reveal more than the answers.

        The change of a histogram's sum over one request is the exact value of that request.
        """
        exact = self.digits(mode) == "exact" and (mode not in TOGETHER or self.shows_uncertainty)
        return self.defended or not exact

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.uncertainty or self.members) and self.digits("average") != "exact":
            raise ValueError(
                f"uncertainty and members are exact numbers, but probabilities is {self.probabilities}: they would show what that hides"
            )
        if "cascade" in self.modes and self.defended:
            raise ValueError(
                "cascade without average: a defended ensemble must not reveal by its timing how sure its members are"
            )
        if "cascade" in self.modes and self.digits("cascade") != "exact":
            raise ValueError(
                "cascade needs exact probabilities: the number of members that ran, and the time, tell how sure an answer is"
            )
        if "cascade" in self.modes and self.risk is not None:
            raise ValueError("risk has no guarantee in cascade: leave out one of them")
        return self

    def digits(self, mode: Mode) -> Literal["exact", "none"] | int:
        """Return how probabilities are shown in a mode: exact, none, or a number of digits."""
        return self.probabilities or ("exact" if mode in TOGETHER else DIGITS)


def of(name: str, policies: Mapping[str, Policy]) -> Policy:
    """Return the policy of an ensemble: the one under its name, else that of `*`, else the default (`average` only)."""
    return policies.get(name) or policies.get("*") or Policy()


@dataclass(frozen=True, slots=True)
class Known:
    """What is known about an ensemble to decide whether it may answer."""

    marks: Marks  # fingerprints of the versions that answer or soon will; of a defended ensemble, of all its versions
    networks: int  # number of networks that a query may draw from
    whole: bool = True  # False if a version of a defended ensemble could not be read


@dataclass(frozen=True, slots=True)
class Closed:
    """The ensembles that are disabled."""

    related: frozenset[str] = frozenset()  # they share networks with a defended ensemble
    uncertain: frozenset[str] = frozenset()  # they may share networks: a version of a defended ensemble cannot be read


def closed(known: Mapping[str, Known], policies: Mapping[str, Policy]) -> Closed:
    """Return the ensembles that are disabled because they share networks with a defended ensemble, or may do so.

    Of several defended ensembles that share networks only one answers; otherwise a client could collect several answers
    to one query. Ensembles with a policy under their own name come before those defended by `*`; among equals, the one
    with the most networks answers.

    Args:
        known: all published ensembles by name, loaded or not.
        policies: policies by ensemble name, and `*`.
    """
    defended = {name for name in known if of(name, policies).defended}
    named = defended & policies.keys()
    uncertain = set[str]() if all(known[name].whole for name in defended) else known.keys() - named
    related = set[str]()
    for family in families({name: one.marks for name, one in known.items()}):
        if among := family & named or family & defended:
            related |= family - {max(sorted(among), key=lambda name: known[name].networks)}
    return Closed(frozenset(related), frozenset(uncertain - related))


CLOSED = "The operator's policy does not allow requests to the ensemble {!r}. GET /ensembles lists the ensembles that are open."
UNCERTAIN = (
    "It cannot be determined at the moment which ensembles share networks with one that the operator defends, so only that one may answer. "
    "The operator's log names the version that cannot be read, and explains what to do. Try again later."
)
