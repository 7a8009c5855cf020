"""One look at the store: which versions are active, and which others must be compared with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from models_store.errors import EnsembleNotFoundError, StoreError
from models_store.records.rollout import RollOut
from models_store.store import Store
from service.inference import policy
from service.inference.policy import Policy

Say = Callable[[int, str], None]  # logs a message once; arguments: log level and message


@dataclass(frozen=True, slots=True)
class Candidate:
    """A published version as read from the store."""

    name: str
    number: int
    digest: str  # hash of the manifest, which contains the hashes of all files of the version
    token: str | None  # identifies the activation; None if the ensemble is not active

    @property
    def identity(self) -> str:
        """Name, number and digest. The digest alone does not suffice: a copied folder holds the same manifest."""
        return f"{self.name}@{self.number} {self.digest}"

    def __str__(self) -> str:
        return f"{self.name}@{self.number} (manifest {self.digest[:12]})"


@dataclass(frozen=True, slots=True)
class Canary:
    """A new version that answers some callers, or is compared with the active one."""

    candidate: Candidate
    plan: RollOut


@dataclass(frozen=True, slots=True)
class Look:
    """The state of the store at one moment."""

    names: frozenset[str] = frozenset()  # all ensembles in the store
    active: Mapping[str, Candidate] = field(default_factory=dict[str, Candidate])
    canaries: Mapping[str, Canary] = field(default_factory=dict[str, Canary])
    # All versions of each defended ensemble.
    versions: Mapping[str, list[Candidate]] = field(default_factory=dict[str, list[Candidate]])
    unread: frozenset[str] = frozenset()  # defended ensembles whose versions cannot be listed
    inactive: frozenset[str] = frozenset()  # ensembles without an active version
    order: tuple[str, ...] = ()  # active ensembles by time of activation, the latest last

    def counting(self) -> Mapping[str, list[Candidate]]:
        """Return the versions that decide who may answer: all of a defended ensemble, of others the active one."""
        return {**{name: [one] for name, one in self.active.items()}, **self.versions}


def look_at(store: Store, policies: Mapping[str, Policy], say: Say) -> Look:
    """Read which versions are active. A problem with one ensemble is logged and does not affect the others.

    Raises:
        StoreError, OSError: the store cannot be read.
    """
    names = store.names()
    active: dict[str, Candidate] = {}
    canaries: dict[str, Canary] = {}
    inactive = set[str]()
    for name in names:
        try:
            try:
                number = store.active(name)
            except EnsembleNotFoundError:
                number = None
            if number is not None:
                active[name] = Candidate(name, number, store.digest(name, number), str(store.activation_token(name)))
                if (canary := _canary(store, name, say)) is not None:
                    canaries[name] = canary
                continue
            inactive.add(name)
            say(
                logging.INFO,
                f"{name} has no active version and is not served; to serve it, run: python -m models_store activate {name} VERSION",
            )
        except Exception as error:  # the folder may contain anything
            say(logging.ERROR, f"the active version of {name} cannot be read, and is not served: {error}")
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
    return Look(frozenset(names), active, canaries, versions, frozenset(unread), frozenset(inactive), tuple(order))


def _canary(store: Store, name: str, say: Say) -> Canary | None:
    """The canary of an ensemble; a problem with it does not affect the active version."""
    try:
        plan = store.roll_out(name)
        if plan is None or plan.ended:
            return None
        return Canary(Candidate(name, plan.version, store.digest(name, plan.version), plan.id), plan)
    except (StoreError, OSError) as error:
        say(logging.ERROR, f"the canary of {name} cannot be read, and does not answer: {error}")
        return None
