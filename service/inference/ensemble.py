"""The ensembles that are served: the active version of each, and its canary, are loaded and verified, and followed.

One thread polls the store. Each new version is loaded in a thread of its own, so that a version that hangs does not
delay others. A version is identified by the digest of its manifest, not by its number.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from models_store.errors import MemberError
from models_store.graphs.runtime import ProviderChoice
from models_store.store import Store
from service.http.errors import ForbiddenError, NotReadyError, UnknownEnsembleError
from service.inference import policy
from service.inference.look import Canary, Candidate, Look, look_at
from service.inference.modes.draws import Keyed
from service.inference.opening import Ensemble, Recipe, Warm, open_version, verify
from service.inference.policy import Closed, Known, Policy
from service.inference.relations import Relations
from service.inference.trial import NOT_COMPARED, NOT_SERVED, Direct, Trial, failed, load_exactly
from service.inference.verdicts import Refusal, RefusedError, Verdicts
from service.operations import memory

AT_ONCE = 2  # versions that are loaded in parallel
OVERTAKEN_SECONDS = 3.0  # after this time, a version still in its trial no longer delays others
LOADING = "The ensembles are being loaded; ask again in a moment."
log = logging.getLogger("bentoml.modepath")  # BentoML prints the logs of loggers below its own name


@dataclass(frozen=True, slots=True)
class _Served:
    """The state that requests read. Immutable: an update replaces it as a whole."""

    loaded: Mapping[str, Ensemble]  # active versions
    canaries: Mapping[str, tuple[Ensemble, Canary]]  # of these
    closed: Closed
    latest: str | None  # the ensemble activated last

    def open(self) -> list[str]:
        """Return the names of the ensembles that answer."""
        return sorted(self.loaded.keys() - self.closed.related - self.closed.uncertain)


@dataclass(slots=True)
class _Task:
    """A version that is being loaded or compared."""

    began: float
    trying: bool = True  # True during its trial, which may take for ever


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
        signed_by: tuple[Path, ...] = (),
    ):
        """Create the object; `follow` or `refresh` loads the ensembles.

        Args:
            store: the store of published ensembles.
            providers: ONNX Runtime providers that run the members.
            default: the ensemble that answers requests that name none; None: the ensemble activated last.
            threads: number of threads that run members; None: all that the process may use.
            policies: policies by ensemble name; see policy.of.
            pool_bytes: memory for the single networks of one ensemble.
            keyed: draws networks in the mode `keyed`.
            warm: called with each new session and a black image before the session serves.
            trial: tries a version before it is opened; None: versions are opened without a trial.
            verdicts: shared with the other workers of the service; None: this process is the only one.
            signed_by: public keys, one of which must have signed a version; empty: signatures are not required.
        """
        self._store = store
        self._threads = threads
        self._policies = policies or {}
        self._pool_bytes = pool_bytes
        self._signed_by = signed_by
        self._keyed = keyed
        self._warm = warm
        self._providers: ProviderChoice = providers
        self._default = default
        self._trial: Trial = trial or Direct(store)
        self._verdicts = verdicts or Verdicts(None)
        # Guards the fields below. Requests take it only when they are refused.
        self._changed = threading.Condition()
        self._look = Look()
        self._looked = False
        self._reachable = True
        self._absent = self._policies.keys() - {"*"}  # named by policies, but never seen in the store since the start
        self._relations = Relations(self._policies)
        self._refused: dict[tuple[str, bool], Refusal] = {}  # by identity, and whether it is for serving or comparing
        self._tasks: dict[tuple[str, bool], _Task] = {}  # with the same keys
        self._served = _Served({}, {}, Closed(), None)
        self._stopped = False

    # For requests

    def why_not_ready(self) -> str | None:
        """Return None if a request could be answered now, else a reason for clients; the log has the details."""
        served = self._served
        if not self._looked:
            return LOADING
        if self._absent:
            return (
                "The service is not ready: its policies name an ensemble that is not published. The operator's log names it. "
                "Requests are refused until it is published, or the policies are corrected."
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
            return "No ensemble may answer: all of them share networks with an ensemble that the operator defends, which is not loaded."
        if found:
            return "No ensemble can be served at the moment. The operator's log says why."
        return "The store holds no active ensemble. Train one with: python -m training.fge. The service loads it automatically."

    def get(self, name: str | None) -> Ensemble:
        """Return the ensemble of that name, or the default ensemble if `name` is None.

        Raises:
            NotReadyError: the ensemble is not loaded (yet), or it is not known whether it may answer.
            ForbiddenError: it shares networks with a defended ensemble.
            UnknownEnsembleError: no ensemble of that name is active.
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

    def canaries(self) -> list[Ensemble]:
        """Return all canaries that are loaded."""
        return [ensemble for ensemble, _ in self._served.canaries.values()]

    def canary(self, name: str) -> tuple[Ensemble, Canary] | None:
        """Return the canary of an ensemble that answers, if it is loaded."""
        return self._served.canaries.get(name)

    @property
    def default_name(self) -> str | None:
        """Name of the ensemble that answers requests that name none: the setting, else the ensemble activated last."""
        return self._default or self._served.latest

    def all(self) -> list[Ensemble]:
        """Return all ensembles that answer, sorted by name."""
        served = self._served
        return [] if self._absent else [served.loaded[name] for name in served.open()]

    # Following

    def refresh(self) -> None:
        """Read the store, load all new activations, and return when that is done.

        A version that cannot be served is logged once, and the previous version keeps answering.
        """
        self._look_again()
        with self._changed:
            while self._begin() or self._tasks:
                self._changed.wait(0.1)

    def follow(self, seconds: float) -> None:
        """Refresh in the background, at once and then every `seconds` seconds, until `close`."""
        threading.Thread(target=self._follow, args=(seconds,), name="activations", daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Wait at most `seconds` seconds until all versions of the first look are loaded or refused.

        Does not wait for a version whose trial takes longer than OVERTAKEN_SECONDS.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while (not self._looked or self._busy()) and (left := until - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.1))

    def close(self) -> None:
        """Stop the background thread of `follow`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def open(self, name: str, number: int) -> Ensemble:
        """Open one version, active or not, and return it ready to answer."""
        return self._opened(Candidate(name, number, self._store.digest(name, number), None))

    def _follow(self, seconds: float) -> None:
        while not self._stopped:
            try:
                self._look_again()
            except Exception:  # the thread must survive every error of the store
                log.exception("looking for activations failed; trying again")
            until = time.monotonic() + seconds
            with self._changed:
                while not self._stopped and (left := until - time.monotonic()) > 0:
                    self._begin()
                    self._changed.wait(min(left, 0.5))  # a trial may exceed OVERTAKEN_SECONDS meanwhile

    # Looking

    def _look_again(self) -> None:
        try:
            look = look_at(self._store, self._policies, self._say)
        except Exception as error:  # loaded ensembles keep answering, whatever happens to the store
            look, why = None, str(error)
        else:
            why = f"the store {self._store.address} has suddenly become empty"
        with self._changed:
            lost = look is None or (not look.names and bool(self._served.loaded))
            if lost and self._reachable:
                log.error("%s. Loaded ensembles keep answering; the store is checked again at every poll.", why)
            if not lost and not self._reachable:
                log.warning("the store %s can be read again", self._store.address)
            self._reachable = not lost
            if look is not None and not lost:
                self._take(look)
            self._looked = True
            self._publish()

    def _say(self, level: int, message: str) -> None:
        """Log a message once for the whole service."""
        if self._verdicts.first(message):
            log.log(level, "%s", message)

    def _take(self, look: Look) -> None:
        for name in self._served.loaded.keys() - look.names:
            log.warning("%s was removed from the store, and is no longer served", name)
            self._verdicts.write(f"last good {name}", None)
        for name in self._served.loaded.keys() & look.inactive:
            log.warning("%s was deactivated, and is no longer served", name)
            self._verdicts.write(f"last good {name}", None)
        self._look = look
        self._absent -= look.names
        for name in sorted(self._absent):
            self._say(
                logging.ERROR,
                f"MODEPATH_POLICIES names {name!r}, which is not in the store: all requests are refused until it is published there. "
                "Is the name misspelt?",
            )
        if self._default is not None and self._default not in look.active:
            self._say(logging.ERROR, f"MODEPATH_DEFAULT names {self._default!r}, which is not active in the store.")
        for name in self._relations.removed(look):
            self._say(
                logging.WARNING,
                f"{name}, which a policy defends, was removed from the store; ensembles that share networks with it stay disabled until the service restarts",
            )

    # Loading and comparing; the caller holds the lock

    def _begin(self) -> bool:
        """Start tasks that are due, and return whether any was started."""
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
        """Yield the versions to compare, which decide who may answer, and then the versions to load."""
        look = self._look
        for candidate in self._relations.unknown(look):
            if self._is_due(candidate, serve=False):
                yield candidate, False
        # The default ensemble comes first, then the latest activation; versions that failed before come last.
        names = list(reversed(look.order))
        names.sort(key=lambda name: ((look.active[name].identity, True) in self._refused, name != self._default))
        for candidate in (look.active[name] for name in names):
            loaded = self._served.loaded.get(candidate.name)
            if (loaded is not None and loaded.identity == candidate.identity) or not self._relations.allow(candidate):
                continue
            if self._is_due(candidate, serve=True):
                yield candidate, True
        for name in names:
            if name not in self._served.loaded and (look.active[name].identity, True) in self._refused:
                last = self._last_good(name)
                if last is not None and self._relations.allow(last) and self._is_due(last, serve=True):
                    yield last, True
        for name, canary in look.canaries.items():
            known = self._served.canaries.get(name)
            if known is not None and known[0].identity == canary.candidate.identity:
                continue
            if self._may_stand_beside(canary.candidate) and self._is_due(canary.candidate, serve=True):
                yield canary.candidate, True

    def _may_stand_beside(self, canary: Candidate) -> bool:
        """Return whether a version may be a canary: another one is served, and it cannot share networks with a defended ensemble.

        Where a policy defends an ensemble, only its own versions are all compared.
        """
        served = self._served.loaded.get(canary.name)
        if served is None or canary.identity == served.identity:
            return False
        if not self._relations.matter:
            return True
        if policy.of(canary.name, self._policies).defended:
            return self._relations.allow(canary)
        self._say(
            logging.WARNING,
            f"{canary} does not answer as a canary: a policy defends another ensemble, and the two may share networks. Activate it instead.",
        )
        return False

    def _last_good(self, name: str) -> Candidate | None:
        """Return the version that this service served last. A worker that starts while the active version is refused serves it."""
        found = self._verdicts.read(f"last good {name}")
        return found if isinstance(found, Candidate) else None

    def _is_due(self, candidate: Candidate, *, serve: bool) -> bool:
        refused = self._refused.get((candidate.identity, serve))
        return (candidate.identity, serve) not in self._tasks and not (refused and refused.holds(candidate.token))

    def _holds_up(self, task: _Task) -> bool:
        return not task.trying or time.monotonic() - task.began < OVERTAKEN_SECONDS

    def _busy(self) -> bool:
        """Return whether more ensembles will probably be ready within moments."""
        tasks = (key for key, task in self._tasks.items() if self._holds_up(task))
        due = ((candidate.identity, serve) for candidate, serve in self._due())
        # A version that failed before may fail again, so it does not count.
        return any(key not in self._refused for key in itertools.chain(tasks, due))

    def _is_on_its_way(self, name: str) -> bool:
        """Return whether the ensemble's active version is being loaded, however long that takes, or is about to be."""
        candidate = self._look.active.get(name)
        if candidate is None or (candidate.identity, True) in self._refused:
            return False
        return (candidate.identity, True) in self._tasks or self._is_due(candidate, serve=True)

    def _bring_in(self, candidate: Candidate, serve: bool) -> None:
        """Load or compare one version. Runs in a thread of its own, without the lock."""
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
        except Exception as error:  # ONNX Runtime's exceptions share no base class
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
            # A version that passed its trial may still need more memory than the other ensembles leave.
            with self._verdicts.surviving(f"opening {candidate.identity} {candidate.token}", candidate.token):
                ensemble = self._opened(candidate)
        except RefusedError as error:
            again = f"It is tried again {error.refusal.pause:.0f} s after the last death."
            self._say(logging.ERROR, f"{candidate} {NOT_SERVED}: {error} {again}")
            raise
        active, canary = self._look.active.get(candidate.name), self._look.canaries.get(candidate.name)
        role = "serving"
        if canary is not None and canary.candidate.identity == candidate.identity:
            role = "canary"
            served = self._served.loaded.get(candidate.name)
            if served is not None and not _are_alike(served, ensemble):
                raise MemberError(
                    f"{candidate} cannot be a canary: it has other inputs or classes than the version that is served. Activate it instead."
                )
        elif active is None or active.identity != candidate.identity:
            role = "the active version is refused; serving the one before,"
        log.info(
            "%s %s: %d members on %s, %s", role, candidate, len(ensemble.manifest.members), ", ".join(ensemble.providers),
            ", ".join(ensemble.policy.modes),
        )  # fmt: skip
        return ensemble

    def _opened(self, candidate: Candidate) -> Ensemble:
        version = load_exactly(self._store, candidate)
        recipe = self._recipe(candidate.name)
        verify(self._store, version, recipe)
        try:
            return open_version(version, recipe, self._keyed, self._warm)
        finally:
            memory.release()

    def _recipe(self, name: str) -> Recipe:
        return Recipe(
            policy.of(name, self._policies), self._providers, self._threads, self._pool_bytes, self._signed_by
        )

    # Publishing to requests; the caller holds the lock

    def _publish(self, ensemble: Ensemble | None = None) -> None:
        look = self._look
        loaded = dict(self._served.loaded)
        ready = [one for one, _ in self._served.canaries.values()] + ([] if ensemble is None else [ensemble])
        canaries: dict[str, tuple[Ensemble, Canary]] = {}
        for one in ready:
            name = one.manifest.name
            wanted, canary = look.active.get(name), look.canaries.get(name)
            # Otherwise another version was activated, or the roll-out has ended, meanwhile.
            if wanted is not None and wanted.identity == one.identity:
                loaded[name] = one
                self._verdicts.write(f"last good {name}", wanted)
            elif canary is not None and canary.candidate.identity == one.identity:
                canaries[name] = one, canary
            elif name not in loaded and (last := self._last_good(name)) is not None and last.identity == one.identity:
                loaded[name] = one
        loaded = {name: one for name, one in loaded.items() if name in look.names - look.inactive}
        canaries = {
            name: both for name, both in canaries.items() if name in loaded and _are_alike(loaded[name], both[0])
        }
        identities = {name: one.identity for name, one in loaded.items()}
        complete = self._reachable and not self._absent
        closed = self._relations.closed(look, identities, self._compares_soon, complete=complete)
        served = _Served(loaded, canaries, closed, None)
        for name in sorted(closed.related & look.active.keys()):
            self._say(logging.WARNING, f"{name} is disabled: it shares networks with an ensemble that a policy defends")
        answering = set(served.open())
        latest = next((name for name in reversed(look.order) if name in answering), None)
        self._served = _Served(loaded, canaries, closed, latest)

    def _compares_soon(self, candidate: Candidate) -> bool:
        key = candidate.identity, False
        return key not in self._refused and (key not in self._tasks or self._holds_up(self._tasks[key]))


def _are_alike(one: Ensemble, other: Ensemble) -> bool:
    """Return whether two versions can answer the same requests with answers of the same form."""
    return one.manifest.input == other.manifest.input and one.manifest.classes == other.manifest.classes
