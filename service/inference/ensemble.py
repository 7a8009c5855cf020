"""The ensembles that are served: the active version of each, loaded, verified, and followed as activations change.

One thread looks at the store; each version that is new there is brought in by a thread of its own, so that none waits for another that
hangs. A version is what its manifest's digest says it is, whatever its number.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from models_store.graphs.runtime import ProviderChoice
from models_store.store import Store
from service.http.errors import ForbiddenError, NotReadyError, UnknownEnsembleError
from service.inference import policy
from service.inference.draws import Keyed
from service.inference.look import Candidate, Look, look_at
from service.inference.opening import Ensemble, Recipe, Warm, open_version
from service.inference.policy import Closed, Known, Policy
from service.inference.relations import Relations
from service.inference.trial import NOT_COMPARED, NOT_SERVED, Direct, Trial, failed, load_exactly
from service.inference.verdicts import Refusal, RefusedError, Verdicts

AT_ONCE = 2  # versions that are brought in side by side
OVERTAKEN_SECONDS = 3.0  # after which one that is still being tried holds up no other
LOADING = "The ensembles are being loaded; ask again in a moment."
log = logging.getLogger("bentoml.modepath")  # BentoML shows what is below its own name


@dataclass(frozen=True, slots=True)
class _Served:
    """What readers see: replaced as a whole, never changed."""

    loaded: Mapping[str, Ensemble]
    closed: Closed
    latest: str | None  # the one activated last

    def open(self) -> list[str]:
        """Names of those that answer."""
        return sorted(self.loaded.keys() - self.closed.related - self.closed.uncertain)


@dataclass(slots=True)
class _Task:
    """A version that is being brought in."""

    began: float
    trying: bool = True  # which may take for ever


class Ensembles:
    """Loaded ensembles by name."""

    def __init__(
        self,
        store: Store,
        providers: ProviderChoice,
        default: str | None,
        *,
        threads: int | None = None,
        policies: Mapping[str, Policy] | None = None,
        pool_bytes: int = 2**30,
        keyed: Keyed | None = None,
        warm: Warm = lambda session, row: session.run(0, row),
        trial: Trial | None = None,
        verdicts: Verdicts | None = None,
    ):
        """Nothing is loaded yet.

        Args:
            store: where published ensembles lie.
            providers: what the members run on.
            default: the ensemble that answers when none is named; None: the one that was activated last.
            threads: that run members.
            policies: what is open, by name; see policy.of.
            pool_bytes: memory for single networks of one ensemble.
            keyed: draws for the mode of that name.
            warm: is called with each new session and a black image, before the session serves.
            trial: what a version has to pass before it is opened; None: nothing.
            verdicts: shared with the service's other workers; None: this process is alone.
        """
        self._store = store
        self._threads = threads
        self._policies = policies or {}
        self._pool_bytes = pool_bytes
        self._keyed = keyed
        self._warm = warm
        self._providers: ProviderChoice = providers
        self._default = default
        self._trial: Trial = trial or Direct(store)
        self._verdicts = verdicts or Verdicts(None)
        # Guards all that follows; readers take it only where they refuse.
        self._changed = threading.Condition()
        self._look = Look()
        self._looked = False
        self._reachable = True
        self._absent = self._policies.keys() - {"*"}  # named by policies, and not in the store since the start
        self._relations = Relations(self._policies)
        self._refused: dict[tuple[str, bool], Refusal] = {}  # by identity: for serving, or for comparing
        self._tasks: dict[tuple[str, bool], _Task] = {}  # likewise
        self._served = _Served({}, Closed(), None)
        self._stopped = False

    # Readers

    def why_not_ready(self) -> str | None:
        """None when a request could be answered now; else for clients: the log names what is wrong."""
        served = self._served
        if not self._looked:
            return LOADING
        if self._absent:
            return (
                "The service is not ready: its policies name an ensemble that is not published. The operator's log says which one. "
                "Nothing is answered until it is published, or the policies are corrected."
            )
        if not served.open():
            return self._why_none(served)
        if self._default is not None and self._default not in served.open():
            return f"The default ensemble does not answer at the moment; the operator's log may say why. Name another one: {', '.join(served.open())}."
        return None

    def _why_none(self, served: _Served) -> str:
        with self._changed:
            if self._busy():
                return LOADING
            found = bool(self._look.active) or not self._reachable
        if served.loaded.keys() & served.closed.uncertain:
            return policy.UNCERTAIN
        if served.loaded:
            return (
                "No ensemble may answer: all share networks with one that the operator defends, and that is not loaded."
            )
        if found:
            return "No ensemble can be served at the moment. The operator's log says why."
        return "The store holds no active ensemble. Train one: python -m training.fge; it is picked up by itself."

    def get(self, name: str | None) -> Ensemble:
        """The ensemble of that name, or the default one.

        Raises:
            NotReadyError: nothing is loaded, or not yet, or it is not known whether it may answer.
            ForbiddenError: it shares networks with a defended one.
            UnknownEnsembleError: no such ensemble.
        """
        served = self._served
        if name is None or not self._looked or self._absent:
            if (why := self.why_not_ready()) is not None:
                raise NotReadyError(why)
            name = name or self._default or served.latest
        found = served.loaded.get(name or "")
        if found is None:
            self._refuse_unknown(name or "", served)
        elif found.manifest.name in served.closed.related:
            raise ForbiddenError(policy.CLOSED.format(found.manifest.name))
        elif found.manifest.name in served.closed.uncertain:
            raise NotReadyError(policy.UNCERTAIN)
        else:
            return found
        raise AssertionError("unknown ensembles are refused")

    def _refuse_unknown(self, name: str, served: _Served) -> None:
        answering = ", ".join(served.open()) or "none"
        with self._changed:
            if self._busy() or self._is_on_its_way(name):
                raise NotReadyError(
                    f"No ensemble {name[:80]!r} is served yet, but some are being loaded; ask again in a moment. Served: {answering}."
                )
            if name in self._look.active:
                raise NotReadyError(
                    f"{name!r} is active, but cannot be served at the moment; the operator's log says why. Served: {answering}."
                )
        raise UnknownEnsembleError(f"No ensemble {name[:80]!r} is served. Served: {answering}.")

    @property
    def default_name(self) -> str | None:
        """Who answers when nobody is named: the setting, else the one that was activated last."""
        return self._default or self._served.latest

    def all(self) -> list[Ensemble]:
        """Every ensemble that answers, by name."""
        served = self._served
        return [] if self._absent else [served.loaded[name] for name in served.open()]

    # Following

    def refresh(self) -> None:
        """Look at the store, and load what was activated since; a version that cannot be served is named once, and the old one goes on."""
        self._look_again()
        with self._changed:
            while self._begin() or self._tasks:
                self._changed.wait(0.1)

    def follow(self, seconds: float) -> None:
        """Refresh in the background, at once and then every so often, until `close`."""
        threading.Thread(target=self._follow, args=(seconds,), name="activations", daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Until all that the first look found is loaded or refused, but no longer than that, and not for one whose trial takes its time."""
        until = time.monotonic() + seconds
        with self._changed:
            while (not self._looked or self._busy()) and (left := until - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.1))

    def close(self) -> None:
        """Stop following."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def open(self, name: str, number: int) -> Ensemble:
        """Make one version ready, whether it is active or not."""
        return self._opened(Candidate(name, number, self._store.digest(name, number), None))

    def _follow(self, seconds: float) -> None:
        while not self._stopped:
            try:
                self._look_again()
            except Exception:  # the thread must outlive whatever the store does
                log.exception("looking for activations failed; trying again")
            until = time.monotonic() + seconds
            with self._changed:
                while not self._stopped and (left := until - time.monotonic()) > 0:
                    self._begin()
                    self._changed.wait(min(left, 0.5))  # one may be overtaken meanwhile

    # Looking

    def _look_again(self) -> None:
        try:
            look = look_at(self._store, self._policies, self._say)
        except Exception as error:  # what is loaded goes on, whatever the store does
            look, why = None, str(error)
        else:
            why = f"the store {self._store.root} is empty all at once"
        with self._changed:
            lost = look is None or (not look.names and bool(self._served.loaded))
            if lost and self._reachable:
                log.error("%s. What is loaded goes on; the store is looked at again and again.", why)
            if not lost and not self._reachable:
                log.warning("the store %s can be read again", self._store.root)
            self._reachable = not lost
            if look is not None and not lost:
                self._take(look)
            self._looked = True
            self._publish()

    def _say(self, level: int, message: str) -> None:
        """Once in the log of the service."""
        if self._verdicts.first(message):
            log.log(level, "%s", message)

    def _take(self, look: Look) -> None:
        for name in self._served.loaded.keys() - look.names:
            log.warning("%s was removed from the store, and is not served any more", name)
        self._look = look
        self._absent -= look.names
        for name in sorted(self._absent):
            self._say(
                logging.ERROR,
                f"MODEPATH_POLICIES names {name!r}, which the store does not hold: nothing is answered until it is published there. "
                "Is the name misspelt?",
            )
        if self._default is not None and self._default not in look.active:
            self._say(logging.ERROR, f"MODEPATH_DEFAULT names {self._default!r}, which is not active in the store.")
        for name in self._relations.removed(look):
            self._say(
                logging.WARNING,
                f"{name}, which a policy defends, was removed from the store; what shares networks with it stays closed until the service starts anew",
            )

    # Bringing in: all of it with the lock

    def _begin(self) -> bool:
        """Start what is due, and say whether anything was."""
        began = False
        for candidate, serve in self._due():
            if sum(self._holds_up(task) for task in self._tasks.values()) >= AT_ONCE:
                break
            key = candidate.identity, serve
            self._tasks[key] = _Task(time.monotonic())
            threading.Thread(target=self._bring_in, args=(candidate, serve), name=str(candidate), daemon=True).start()
            began = True
        return began

    def _due(self) -> Iterator[tuple[Candidate, bool]]:
        """What is to be compared, which decides who may answer, and then what is to be served."""
        look = self._look
        for candidate in self._relations.unknown(look):
            if self._is_due(candidate, serve=False):
                yield candidate, False
        # Those that failed before come last, and those that are asked most come first.
        names = list(reversed(look.order))
        names.sort(key=lambda name: ((look.active[name].identity, True) in self._refused, name != self._default))
        for candidate in (look.active[name] for name in names):
            loaded = self._served.loaded.get(candidate.name)
            if (loaded is not None and loaded.identity == candidate.identity) or not self._relations.allow(candidate):
                continue
            if self._is_due(candidate, serve=True):
                yield candidate, True

    def _is_due(self, candidate: Candidate, *, serve: bool) -> bool:
        refused = self._refused.get((candidate.identity, serve))
        return (candidate.identity, serve) not in self._tasks and not (refused and refused.holds(candidate.token))

    def _holds_up(self, task: _Task) -> bool:
        return not task.trying or time.monotonic() - task.began < OVERTAKEN_SECONDS

    def _busy(self) -> bool:
        """Will more be ready in a moment?"""
        tasks = (key for key, task in self._tasks.items() if self._holds_up(task))
        due = ((candidate.identity, serve) for candidate, serve in self._due())
        return any(key not in self._refused for key in itertools.chain(tasks, due))  # what failed before may fail again

    def _is_on_its_way(self, name: str) -> bool:
        """Is it being brought in, however long that takes, or about to be?"""
        candidate = self._look.active.get(name)
        if candidate is None or (candidate.identity, True) in self._refused:
            return False
        return (candidate.identity, True) in self._tasks or self._is_due(candidate, serve=True)

    def _bring_in(self, candidate: Candidate, serve: bool) -> None:
        """In a thread of its own, without the lock."""
        key, began = (candidate.identity, serve), time.monotonic()
        refused: Refusal | None = None
        known: Known | None = None
        ensemble: Ensemble | None = None
        try:
            if serve:
                ensemble = self._tried_and_opened(candidate)
            else:
                known = self._trial.known(candidate)
        except RefusedError as error:
            refused = error.refusal
        except Exception as error:  # ONNX Runtime's share no base class
            what = NOT_SERVED if serve else NOT_COMPARED
            spent = time.monotonic() - began
            refused = failed(self._verdicts, self._refused.get(key), error, candidate, what, spent)
        with self._changed:
            del self._tasks[key]
            self._refused.pop(key, None)
            if refused is not None:
                self._refused[key] = refused
            if known is not None:
                self._relations.learn(candidate, known)
            self._publish(ensemble)
            self._changed.notify_all()

    def _tried_and_opened(self, candidate: Candidate) -> Ensemble:
        self._trial.opens(candidate, self._recipe(candidate.name))
        self._tasks[candidate.identity, True].trying = False
        try:
            # One that passed its trial may still need more memory than the others leave.
            with self._verdicts.surviving(f"opening {candidate.identity} {candidate.token}", candidate.token):
                ensemble = self._opened(candidate)
        except RefusedError as error:
            again = f"It is tried again {error.refusal.pause:.0f} s after the last death."
            self._say(logging.ERROR, f"{candidate} {NOT_SERVED}: {error} {again}")
            raise
        log.info(
            "serving %s: %d members on %s, %s", candidate, len(ensemble.manifest.members), ", ".join(ensemble.providers),
            ", ".join(ensemble.policy.modes),
        )  # fmt: skip
        return ensemble

    def _opened(self, candidate: Candidate) -> Ensemble:
        version = load_exactly(self._store, candidate)
        self._store.verify(version)
        return open_version(version, self._recipe(candidate.name), self._keyed, self._warm)

    def _recipe(self, name: str) -> Recipe:
        return Recipe(policy.of(name, self._policies), self._providers, self._threads, self._pool_bytes)

    # Publishing to readers: with the lock

    def _publish(self, ensemble: Ensemble | None = None) -> None:
        look = self._look
        loaded = dict(self._served.loaded)
        if ensemble is not None:
            wanted = look.active.get(ensemble.manifest.name)
            if wanted is not None and wanted.identity == ensemble.identity:  # another one may have been activated since
                loaded[ensemble.manifest.name] = ensemble
        loaded = {name: one for name, one in loaded.items() if name in look.names}
        identities = {name: one.identity for name, one in loaded.items()}
        complete = self._reachable and not self._absent
        closed = self._relations.closed(look, identities, self._compares_soon, complete=complete)
        served = _Served(loaded, closed, None)
        for name in sorted(closed.related & look.active.keys()):
            self._say(
                logging.WARNING, f"{name} answers nobody: it shares networks with an ensemble that a policy defends"
            )
        answering = set(served.open())
        latest = next((name for name in reversed(look.order) if name in answering), None)
        self._served = _Served(loaded, closed, latest)

    def _compares_soon(self, candidate: Candidate) -> bool:
        key = candidate.identity, False
        return key not in self._refused and (key not in self._tasks or self._holds_up(self._tasks[key]))
