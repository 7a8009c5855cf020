"""Determines which ensembles share networks with a defended one, as far as their versions have been compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models_store.lineage import Marks
from service.inference import policy
from service.inference.look import Candidate, Look
from service.inference.policy import Closed, Known, Policy

Question = Callable[[Candidate], bool]


class Relations:
    """Collects which networks each version holds, and derives which ensembles may answer.

    Not thread-safe: the caller must hold a lock.
    """

    def __init__(self, policies: Mapping[str, Policy]):
        self._policies = policies
        self.matter = any(one.defended for one in policies.values())
        self._known: dict[str, Known] = {}
        # All versions that each defended ensemble ever had, removed ones included: clients may have answers from them.
        self._defended: dict[str, set[str]] = {}
        self._settled = False  # True once all versions of one look were compared, or could not be compared
        self._judged: dict[str, tuple[frozenset[str], bool]] = {}  # the input from which `_closed` was computed
        self._closed = Closed()

    def learn(self, candidate: Candidate, known: Known) -> None:
        """Record which networks a version holds."""
        self._known[candidate.identity] = known

    def unknown(self, look: Look) -> list[Candidate]:
        """Return the versions that are not compared yet."""
        if not self.matter:
            return []
        return [one for many in look.counting().values() for one in many if one.identity not in self._known]

    def allow(self, candidate: Candidate) -> bool:
        """Return whether a version may be opened.

        It may not before its networks are known: clients could query it before the ensembles that share them are
        disabled.
        """
        return not self.matter or candidate.identity in self._known

    def removed(self, look: Look) -> set[str]:
        """Return the defended ensembles that are no longer in the store."""
        return self._defended.keys() - look.names

    def closed(self, look: Look, loaded: Mapping[str, str], soon: Question, *, complete: bool) -> Closed:
        """Return the ensembles that are disabled.

        Args:
            look: the state of the store.
            loaded: identities of the versions that answer, by name.
            soon: returns True if a version will probably be compared within moments.
            complete: True if the store was read, and holds every ensemble that the policies name.
        """
        if not self.matter:
            return Closed()
        unknown = self.unknown(look)
        self._settled = self._settled or (complete and not any(map(soon, unknown)))
        counting = look.counting()
        found: dict[str, tuple[frozenset[str], bool]] = {}
        for name in look.names:
            versions = counting.get(name, [])
            held = {one.identity for one in versions} | ({loaded[name]} if name in loaded else set[str]())
            held &= self._known.keys()
            whole = True
            if policy.of(name, self._policies).defended:
                held |= self._defended.get(name, set())
                self._defended[name] = held
                # While a version is about to be compared, ensembles that answered before keep answering. If it cannot
                # be compared, or if that takes long, they are disabled.
                read = all(one.identity in self._known or soon(one) for one in versions)
                whole = self._settled and read and name not in look.unread
            found[name] = frozenset(held), whole
        for name in self.removed(look):
            found[name] = frozenset(self._defended[name]), True
        if found != self._judged:  # computed only on a change: comparing all ensembles takes time
            gone = self.removed(look)
            known = {name: self._joined(held, whole, name in gone) for name, (held, whole) in found.items()}
            self._judged, self._closed = found, policy.closed(known, self._policies)
        return self._closed

    def _joined(self, held: frozenset[str], whole: bool, gone: bool) -> Known:
        read = [self._known[identity] for identity in sorted(held)]
        networks = 0 if gone else max((one.networks for one in read), default=0)
        return Known(Marks().union(*(one.marks for one in read)), networks, whole)
