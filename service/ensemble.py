"""The ensembles that are served: the active version of each, loaded, verified, and followed as activations change."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models_store import lineage
from models_store.errors import EnsembleNotFoundError, ProviderError, StoreError
from models_store.manifest import Manifest
from models_store.runtime import EnsembleSession, ProviderChoice, default_threads
from models_store.store import Store
from service import policy
from service import pool as pools
from service.draws import LEVELS, Draw, Keyed, at_random, quantised
from service.errors import ForbiddenError, NotReadyError, UnknownEnsembleError
from service.images import Images
from service.modes import Average, OneEach
from service.policy import Known, Mode, Policy
from service.pool import Pool
from service.session import Rows, Session

FIRST_PAUSE, MAX_PAUSE = 1.0, 300.0  # seconds
log = logging.getLogger("bentoml.modepath")  # BentoML shows what is below its own name


@dataclass(frozen=True, slots=True)
class Ensemble:
    """One of them, ready to answer in the modes that its policy opens."""

    manifest: Manifest
    policy: Policy
    providers: list[str]
    sessions: dict[Mode, Session]
    pool: Pool | None  # of single networks, where a mode needs them
    draws: dict[Mode, Draw]

    def mode(self, asked: Mode | None) -> Mode:
        """The mode of a request.

        Raises:
            ForbiddenError: it is not open.
        """
        if asked is None:
            return self.policy.modes[0]
        if asked not in self.policy.modes:
            raise ForbiddenError(
                f"Mode {asked!r} of {self.manifest.name} is not open here; open: {', '.join(self.policy.modes)}."
            )
        return asked

    def rows(self, mode: Mode, images: Images, caller: str = "") -> Rows:
        """What is run for a request; a network is drawn for each image where each gets one of its own.

        `caller` is who asks, where somebody who can be trusted says so.
        """
        if self.pool is None or mode not in self.draws:
            return Rows(images)
        asked = f"{self.manifest.name}@{self.manifest.version} {caller}".encode()
        if mode == "keyed":
            # The network sees what the key sees: else a question could be varied within its cell, and one network be asked all of it.
            images = (quantised(images) / np.float32(LEVELS)).astype(np.float32)
        places = self.draws[mode](images, len(self.pool), asked)
        return Rows(images, tuple(self.pool[int(place)] for place in places))


@dataclass(frozen=True, slots=True)
class _Served:
    loaded: dict[str, Ensemble]
    closed: set[str]  # that answer nobody
    latest: str | None  # the one activated last


@dataclass(frozen=True, slots=True)
class _Refused:
    why: str
    activated: float | None
    pause: float  # seconds until it is tried again
    again: float  # monotonic time


class Ensembles:
    """Loaded ensembles by name. Readers see a record that is replaced, never changed."""

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
        warm: Callable[[Session, Rows], object] = lambda session, row: session.run(0, row),
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
        """
        self._store = store
        self._threads = threads
        self._policies = policies or {}
        self._pool_bytes = pool_bytes
        self._keyed = keyed
        self._warm = warm
        self._providers: ProviderChoice = providers
        self._default = default
        self._unknown: set[str] = set()  # names in policies that were told of
        self._told: set[str] = set()  # closed, and told of
        self._known: dict[tuple[str, int], Known] = {}  # by version
        self._unread: dict[tuple[str, int], _Refused] = {}  # likewise
        self._served = _Served({}, set(), None)
        self._refused: dict[str, _Refused] = {}
        self._looked = threading.Event()
        self._stop = threading.Event()

    def refresh(self) -> None:
        """Load what was activated since; a version that cannot be served is said once, and the old one goes on."""
        try:
            names = self._store.names()
            loaded: dict[str, Ensemble] = {}
            activated: dict[str, float] = {}
            # Loading takes its time: relatives are closed before, in every process.
            soon = self._closed(names, self._served.loaded)
            self._served = dataclasses.replace(self._served, closed=self._served.closed | soon)
            for name in names:
                if (ensemble := self._refreshed(name, activated)) is not None:
                    loaded[name] = ensemble
            closed = self._closed(names, loaded)
            for name in self._policies.keys() - set(names) - {"*", *self._unknown}:
                log.error(
                    "MODEPATH_POLICIES names %r, which the store does not hold; nothing follows that policy.", name
                )
                self._unknown.add(name)
            for name in sorted(closed - self._told):
                log.warning(
                    "%s answers nobody: it shares networks with an ensemble that the policy defends, or nobody knows",
                    name,
                )
            self._told = closed
            open_ones = [name for name in loaded if name in activated and name not in closed]
            latest = max(open_ones, key=lambda name: activated[name], default=None)
            self._served = _Served(loaded, closed, latest)
        finally:
            self._looked.set()

    def _refreshed(self, name: str, activated: dict[str, float]) -> Ensemble | None:
        current = self._served.loaded.get(name)
        try:
            number = self._store.active(name)
            activated[name] = self._store.activated_at(name)
            if current is not None and current.manifest.version == number:
                self._refused.pop(name, None)
                return current
            refused = self._refused.get(name)
            # What was refused is looked at again when it is activated anew, or now and then: hashing it costs.
            if refused is not None and refused.activated == activated[name] and time.monotonic() < refused.again:
                return current
            ensemble = self.open(name, number)
            self._refused.pop(name, None)
            return ensemble
        except Exception as error:  # ONNX Runtime's share no base class, and one ensemble must not stop the others
            what = f"{name} is not served anew"
            self._refused[name] = _refused(self._refused.get(name), error, what, activated.get(name))
            return current

    def _closed(self, names: Sequence[str], loaded: Mapping[str, Ensemble]) -> set[str]:
        return policy.closed({name: self._know(name, loaded.get(name)) for name in names}, self._policies)

    def _know(self, name: str, loaded: Ensemble | None) -> Known:
        """Of a defended ensemble all versions count, active or not: whoever had one of them answered from it."""
        numbers = {loaded.manifest.version} if loaded else set[int]()
        whole = True
        try:
            if policy.of(name, self._policies).defended:
                numbers.update(self._store.versions(name))
            else:
                numbers.add(self._store.active(name))
        except EnsembleNotFoundError:  # none is active
            pass
        except (StoreError, OSError):
            whole = False
        found = [self._read(name, number) for number in sorted(numbers)]
        read = [one for one in found if one is not None]
        marks = frozenset[bytes]().union(*(one.marks for one in read))
        return Known(marks, max((one.networks for one in read), default=0), whole and len(read) == len(found))

    def _read(self, name: str, number: int) -> Known | None:
        """What one version holds; None while it cannot be read."""
        at = name, number
        refused = self._unread.get(at)
        if at not in self._known and (refused is None or time.monotonic() >= refused.again):
            try:
                version = self._store.load(name, number)
                bank = version.manifest.bank
                networks = bank.points if bank else len(version.manifest.members)
                self._known[at] = Known(lineage.marks(version), networks)
            except Exception as error:  # whatever it is: who shares networks with it is not known then
                self._unread[at] = _refused(refused, error, f"the networks of {name}@{number} could not be read")
        return self._known.get(at)

    def follow(self, seconds: float) -> None:
        """Refresh in the background, at once and then every so often, until `close`."""
        threading.Thread(target=self._follow, args=(seconds,), name="activations", daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Until the first look is over, whatever it found, but no longer than that."""
        self._looked.wait(seconds)

    def close(self) -> None:
        """Stop following."""
        self._stop.set()

    def why_not_ready(self) -> str | None:
        """None when a request could be answered now."""
        if not self._looked.is_set():
            return "The ensembles are being loaded; ask again in a moment."
        loaded, closed = self._served.loaded, self._served.closed
        if not loaded.keys() - closed:
            if closed & loaded.keys():
                return "No ensemble may answer: all share networks with one that the policy defends, and that is not loaded."
            if self._refused:
                return f"No ensemble can be served: {'; '.join(one.why for one in self._refused.values())}"
            return f"The store {self._store.root} holds no active ensemble. Train one: python -m training.fge; it is picked up by itself."
        if self._default is not None and self._default not in loaded:
            return f"The default ensemble {self._default!r} (MODEPATH_DEFAULT) is not in the store {self._store.root}."
        if self._default is not None and self._default in closed:
            return policy.CLOSED.format(self._default)
        return None

    def get(self, name: str | None) -> Ensemble:
        """The ensemble of that name, or the default one.

        Raises:
            NotReadyError: nothing is loaded.
            ForbiddenError: it shares networks with a defended one.
            UnknownEnsembleError: no such ensemble.
        """
        served = self._served
        if name is None:
            if (why := self.why_not_ready()) is not None:
                raise NotReadyError(why)
            name = self._default or served.latest
        elif not self._looked.is_set():
            raise NotReadyError("The ensembles are being loaded; ask again in a moment.")
        found = served.loaded.get(name or "")
        if found is None:
            raise UnknownEnsembleError(
                f"No ensemble {(name or '')[:80]!r} is served. Served: {', '.join(one.manifest.name for one in self.all()) or 'none'}."
            )
        if found.manifest.name in served.closed:
            raise ForbiddenError(policy.CLOSED.format(found.manifest.name))
        return found

    @property
    def default_name(self) -> str | None:
        """Who answers when nobody is named: the setting, else the one that was activated last."""
        return self._default or self._served.latest

    def all(self) -> list[Ensemble]:
        """Every ensemble that answers, by name."""
        served = self._served
        return [served.loaded[name] for name in sorted(served.loaded.keys() - served.closed)]

    def open(self, name: str, number: int) -> Ensemble:
        """Make one version ready, whether it is active or not."""
        version = self._store.load(name, number)
        self._store.verify(version)
        found, providers = policy.of(name, self._policies), list[str]()
        sessions: dict[Mode, Session] = {}
        draws: dict[Mode, Draw] = {}
        pool = None
        if "average" in found.modes:
            members = EnsembleSession(version.folder, version.manifest, self._providers, self._threads)
            sessions["average"], providers = Average(members), members.providers
        alone: list[Mode] = [mode for mode in found.modes if mode != "average"]
        if alone:
            source = pools.source(version, self._providers)
            order = self._keyed.order(source.count) if self._keyed and "keyed" in alone else None
            pool = Pool(source, self._pool_bytes, order)
            providers = pool[0].session.providers
            if source.count == 1:
                log.warning("%s has one network: every query is answered by it, whatever its modes", version.name)
            each = OneEach(self._threads or default_threads())
            for mode in alone:
                sessions[mode], draws[mode] = each, self._draw(mode)
            log.info("%s: %d of %d networks ready, %d MiB", version.name, len(pool), source.count, pool.bytes >> 20)
        ensemble = Ensemble(version.manifest, found, providers, sessions, pool, draws)
        image = np.zeros((1, *version.manifest.input.shape), np.float32)
        for mode in found.modes:
            self._warm(sessions[mode], ensemble.rows(mode, image))
        log.info(
            "serving %s: %d members on %s, %s",
            version.name,
            len(version.manifest.members),
            ", ".join(providers),
            ", ".join(found.modes),
        )
        return ensemble

    def _draw(self, mode: Mode) -> Draw:
        if mode == "random":
            return at_random
        assert self._keyed is not None, "whoever opens `keyed` gives a key"
        return self._keyed

    def _follow(self, seconds: float) -> None:
        while True:
            _logged(self.refresh)
            if self._stop.wait(seconds):
                return


def _refused(before: _Refused | None, error: Exception, what: str, activated: float | None = None) -> _Refused:
    """Said once, and tried again after twice the time."""
    if before is None or before.why != str(error):
        known = isinstance(error, StoreError | ProviderError | OSError)
        log.error("%s: %s", what, error, exc_info=None if known else error)
    pause = min(2 * before.pause, MAX_PAUSE) if before else FIRST_PAUSE
    return _Refused(str(error), activated, pause, time.monotonic() + pause)


def _logged(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:  # the thread must outlive whatever the store does
        log.exception("looking for activations failed; trying again")
