"""Which ensembles share networks with a defended one, as far as that is known by now."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models_store.lineage import Marks
from service.inference import policy
from service.inference.look import Candidate, Look
from service.inference.policy import Closed, Known, Policy

Question = Callable[[Candidate], bool]


class Relations:
    """What versions hold, by identity, and what follows for who may answer. Its caller holds a lock."""

    def __init__(self, policies: Mapping[str, Policy]):
        self._policies = policies
        self.matter = any(one.defended for one in policies.values())
        self._known: dict[str, Known] = {}
        # What each defended ensemble ever had, those that were removed included: who had one of them answered from it.
        self._defended: dict[str, set[str]] = {}
        self._settled = False  # was all that there was to compare compared once, or given up?
        self._judged: dict[str, tuple[frozenset[str], bool]] = {}  # what the answer below is for
        self._closed = Closed()

    def learn(self, candidate: Candidate, known: Known) -> None:
        """Keep what a version holds."""
        self._known[candidate.identity] = known

    def unknown(self, look: Look) -> list[Candidate]:
        """Versions that are to be compared."""
        if not self.matter:
            return []
        return [one for many in look.counting().values() for one in many if one.identity not in self._known]

    def allow(self, candidate: Candidate) -> bool:
        """May it be opened? Not before it is known what it holds, so that nobody can ask it before its relatives are closed."""
        return not self.matter or candidate.identity in self._known

    def removed(self, look: Look) -> set[str]:
        """Defended ensembles that are not in the store any more."""
        return self._defended.keys() - look.names

    def closed(self, look: Look, loaded: Mapping[str, str], soon: Question, *, complete: bool) -> Closed:
        """Which ensembles answer nobody.

        Args:
            look: what there is.
            loaded: identities of the versions that answer, by name.
            soon: is one likely to be compared in a moment?
            complete: was the store read, and did it have all that the policies name?
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
                # A version that is about to be compared closes nobody who answered before; one that cannot be, or takes its time, does.
                read = all(one.identity in self._known or soon(one) for one in versions)
                whole = self._settled and read and name not in look.unread
            found[name] = frozenset(held), whole
        for name in self.removed(look):
            found[name] = frozenset(self._defended[name]), True
        if found != self._judged:  # comparing all of them takes its time
            gone = self.removed(look)
            known = {name: self._joined(held, whole, name in gone) for name, (held, whole) in found.items()}
            self._judged, self._closed = found, policy.closed(known, self._policies)
        return self._closed

    def _joined(self, held: frozenset[str], whole: bool, gone: bool) -> Known:
        read = [self._known[identity] for identity in sorted(held)]
        networks = 0 if gone else max((one.networks for one in read), default=0)
        return Known(Marks().union(*(one.marks for one in read)), networks, whole)
