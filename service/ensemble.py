"""The ensembles that are served: the active version of each, loaded, verified, and followed as activations change."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models_store.errors import ProviderError, StoreError
from models_store.runtime import EnsembleSession, ProviderChoice
from models_store.store import Store
from service.errors import NotReadyError, UnknownEnsembleError

FIRST_PAUSE, MAX_PAUSE = 1.0, 300.0  # seconds
log = logging.getLogger("bentoml.modepath")  # BentoML shows what is below its own name


@dataclass(frozen=True, slots=True)
class _Served:
    loaded: dict[str, EnsembleSession]
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
        warm: Callable[[EnsembleSession, NDArray[np.float32]], object] = EnsembleSession.logits,
    ):
        """Nothing is loaded yet.

        Args:
            store: where published ensembles lie.
            providers: what the members run on.
            default: the ensemble that answers when none is named; None: the one that was activated last.
            threads: that run members.
            warm: is called with each new session and one black image, before the session serves.
        """
        self._store = store
        self._threads = threads
        self._warm = warm
        self._providers: ProviderChoice = providers
        self._default = default
        self._served = _Served({}, None)
        self._refused: dict[str, _Refused] = {}
        self._looked = threading.Event()
        self._stop = threading.Event()

    def refresh(self) -> None:
        """Load what was activated since; a version that cannot be served is said once, and the old one goes on."""
        try:
            loaded: dict[str, EnsembleSession] = {}
            activated: dict[str, float] = {}
            for name in self._store.names():
                if (session := self._refreshed(name, activated)) is not None:
                    loaded[name] = session
            latest = max((n for n in loaded if n in activated), key=lambda n: activated[n], default=None)
            self._served = _Served(loaded, latest)
        finally:
            self._looked.set()

    def _refreshed(self, name: str, activated: dict[str, float]) -> EnsembleSession | None:
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
            session = self._open(name, number)
            self._refused.pop(name, None)
            return session
        except Exception as error:  # ONNX Runtime's share no base class, and one ensemble must not stop the others
            before = self._refused.get(name)
            if before is None or before.why != str(error):
                known = isinstance(error, StoreError | ProviderError | OSError)
                log.error("%s is not served anew: %s", name, error, exc_info=None if known else error)
            pause = min(2 * before.pause, MAX_PAUSE) if before else FIRST_PAUSE
            self._refused[name] = _Refused(str(error), activated.get(name), pause, time.monotonic() + pause)
            return current

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
        loaded = self._served.loaded
        if not loaded:
            if self._refused:
                return f"No ensemble can be served: {'; '.join(one.why for one in self._refused.values())}"
            return f"The store {self._store.root} holds no active ensemble. Train one: python -m training.fge; it is picked up by itself."
        if self._default is not None and self._default not in loaded:
            return f"The default ensemble {self._default!r} (MODEPATH_DEFAULT) is not in the store {self._store.root}."
        return None

    def get(self, name: str | None) -> EnsembleSession:
        """The ensemble of that name, or the default one.

        Raises:
            NotReadyError: nothing is loaded.
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
                f"No ensemble {(name or '')[:80]!r} is served. Served: {', '.join(sorted(served.loaded)) or 'none'}."
            )
        return found

    @property
    def default_name(self) -> str | None:
        """Who answers when nobody is named: the setting, else the one that was activated last."""
        return self._default or self._served.latest

    def all(self) -> list[EnsembleSession]:
        """Every loaded ensemble, by name."""
        loaded = self._served.loaded
        return [loaded[name] for name in sorted(loaded)]

    def _open(self, name: str, number: int) -> EnsembleSession:
        version = self._store.load(name, number)
        self._store.verify(version)
        session = EnsembleSession(version.folder, version.manifest, self._providers, self._threads)
        self._warm(session, np.zeros((1, *version.manifest.input.shape), np.float32))
        log.info(
            "serving %s: %d members on %s", version.name, len(version.manifest.members), ", ".join(session.providers)
        )
        return session

    def _follow(self, seconds: float) -> None:
        while True:
            _logged(self.refresh)
            if self._stop.wait(seconds):
                return


def _logged(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:  # the thread must outlive whatever the store does
        log.exception("looking for activations failed; trying again")
