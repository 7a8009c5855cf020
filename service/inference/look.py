"""What one look at the store finds: which versions are active, and which others count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from models_store.errors import EnsembleNotFoundError, StoreError
from models_store.store import Store
from service.inference import policy
from service.inference.policy import Policy

Say = Callable[[int, str], None]  # a level of logging and a message, which is logged once


@dataclass(frozen=True, slots=True)
class Candidate:
    """A published version as it was found."""

    name: str
    number: int
    digest: str  # of its manifest, which has the hashes of all its files
    token: str | None  # of its activation; None: it is not active

    @property
    def identity(self) -> str:
        """What it is, and where: a copied folder holds the same manifest, but is no version."""
        return f"{self.name}@{self.number} {self.digest}"

    def __str__(self) -> str:
        return f"{self.name}@{self.number} (manifest {self.digest[:12]})"


@dataclass(frozen=True, slots=True)
class Look:
    """One look."""

    names: frozenset[str] = frozenset()
    active: Mapping[str, Candidate] = field(default_factory=dict[str, Candidate])
    versions: Mapping[str, list[Candidate]] = field(default_factory=dict[str, list[Candidate]])  # of defended ones, all
    unread: frozenset[str] = frozenset()  # defended ones whose versions cannot be listed
    order: tuple[str, ...] = ()  # of the active ones: what was activated last comes last

    def counting(self) -> Mapping[str, list[Candidate]]:
        """Versions that decide who may answer: of a defended ensemble all, of others the active one."""
        return {**{name: [one] for name, one in self.active.items()}, **self.versions}


def look_at(store: Store, policies: Mapping[str, Policy], say: Say) -> Look:
    """Read what is active now. What is wrong with one ensemble is said, and stops no other.

    Raises:
        StoreError, OSError: the store cannot be read.
    """
    names = store.names()
    active = {name: found for name in names if (found := _active(store, name, say)) is not None}
    versions: dict[str, list[Candidate]] = {}
    unread = set[str]()
    for name in (name for name in names if policy.of(name, policies).defended):
        token = active[name].token if name in active else None
        try:
            versions[name] = [
                Candidate(name, number, store.digest(name, number), token) for number in store.versions(name)
            ]
        except (StoreError, OSError) as error:
            unread.add(name)
            say(logging.ERROR, f"the versions of {name}, which a policy defends, cannot be read: {error}")
    order = [name for name in store.activation_order() if name in active]
    return Look(frozenset(names), active, versions, frozenset(unread), tuple(order))


def _active(store: Store, name: str, say: Say) -> Candidate | None:
    try:
        try:
            number = store.active(name)
        except EnsembleNotFoundError:
            say(
                logging.INFO,
                f"{name} has no active version and is not loaded; to serve it, run: python -m models_store activate {name} VERSION",
            )
            return None
        return Candidate(name, number, store.digest(name, number), str(store.activation_token(name)))
    except Exception as error:  # whatever somebody put there
        say(logging.ERROR, f"the active version of {name} cannot be read, and is not served: {error}")
        return None
