"""Results of trials, shared by the workers of a service: whether a version can be opened, and when it is tried again.

They are stored in a folder that the process that starts the workers creates, as service/operations/metrics.py does. If
the folder is lost or cannot be written, each worker continues with its own results.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import os
import pickle
import shutil
import stat
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from models_store.errors import ModepathError

FOLDER = "MODEPATH_VERDICTS_FOLDER"
FIRST_PAUSE, MAX_PAUSE = 1.0, 300.0  # seconds
COSTLY = 10.0  # the pause after a failed trial is at least this many times its duration
DEATH_PAUSE = 30.0  # seconds; long, because the death of a worker fails all its requests


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a version is not opened, and until when."""

    why: str
    token: str | None  # identifies the activation for which the version was tried
    pause: float  # seconds
    again: float  # end of the pause on time.monotonic, which is the same for all processes of a machine

    def holds(self, token: str | None) -> bool:
        """Return False if the version must be tried again: it was activated again, or the pause is over."""
        return token == self.token and time.monotonic() < self.again


def refusal(before: Refusal | None, why: str, token: str | None, spent: float) -> Refusal:
    """Return a refusal whose pause doubles with each failure, and is longer after a long trial.

    Args:
        before: the previous failure of this version.
        why: the reason of the failure.
        token: identifies the activation.
        spent: duration of the failed trial in seconds.
    """
    pause = FIRST_PAUSE if before is None or before.token != token else min(2 * before.pause, MAX_PAUSE)
    pause = max(pause, COSTLY * spent)
    return Refusal(why, token, pause, time.monotonic() + pause)


class RefusedError(ModepathError):
    """A version failed, in this worker or another, and must not be tried again yet."""

    def __init__(self, refusal: Refusal):
        super().__init__(refusal.why)
        self.refusal = refusal


class Verdicts:
    """Records by key, and a lock per key, so that one worker at a time examines a version."""

    def __init__(self, folder: Path | None):
        """Use a folder that the workers share; None: the records belong to this process alone."""
        self._folder = folder
        self._own: dict[str, object] = {}

    @classmethod
    def shared(cls) -> Verdicts:
        """Return the verdicts shared by the workers of this process's service."""
        folder = os.environ.get(FOLDER)
        return cls(Path(folder) if folder else None)

    @contextlib.contextmanager
    def turn(self, key: str) -> Generator[None]:
        """Hold the lock of a key. The operating system releases the lock of a worker that dies."""
        with contextlib.ExitStack() as stack:
            if (folder := self._usable()) is not None:
                with contextlib.suppress(OSError):
                    lock = stack.enter_context((folder / f"{_file(key)}.lock").open("w"))
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read(self, key: str) -> object:
        """Return the record of a key, or None."""
        if (folder := self._usable()) is not None:
            # A damaged pickle may raise any exception. The version is then examined again.
            with contextlib.suppress(Exception):
                return pickle.loads((folder / _file(key)).read_bytes())
        return self._own.get(key)

    def write(self, key: str, record: object) -> None:
        """Store a record for all workers."""
        self._own[key] = record
        if (folder := self._usable()) is not None:
            with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(pickle.dumps(record))
                file.flush()
                Path(file.name).replace(folder / _file(key))

    @contextlib.contextmanager
    def surviving(self, key: str, token: str | None) -> Generator[None]:
        """Guard work that may kill this process. After it has killed a worker, it is refused until a pause is over.

        Raises:
            RefusedError: the pause is not over.
        """
        with self.turn(key):
            begun = self._begun(key)
            deaths = [when for process, when in begun.items() if not _is_alive(process)]
            if deaths:
                pause = min(DEATH_PAUSE * 2 ** (len(deaths) - 1), MAX_PAUSE)
                if time.monotonic() < max(deaths) + pause:
                    why = f"{len(deaths)} worker(s) died while they opened it. Does it take more memory than there is?"
                    raise RefusedError(Refusal(why, token, pause, max(deaths) + pause))
            self.write(key, {**begun, os.getpid(): time.monotonic()})
        try:
            yield
        finally:
            with self.turn(key):
                begun = self._begun(key)
                begun.pop(os.getpid(), None)
                self.write(key, begun)

    def _begun(self, key: str) -> dict[int, float]:
        found = self.read(key)
        return dict(cast("dict[int, float]", found)) if isinstance(found, dict) else {}

    def first(self, *what: object) -> bool:
        """Return True only for the first call with these arguments in any worker, so that each event is logged once."""
        key = f"said {what}"
        if key in self._own:
            return False
        self._own[key] = True
        if (folder := self._usable()) is not None:
            try:
                (folder / _file(key)).touch(exist_ok=False)
            except FileExistsError:
                return False
            except OSError:
                return True
        return True

    def _usable(self) -> Path | None:
        """Return the folder, created again if it was removed; None if it cannot be used.

        It must belong to this user and be private, because its files are unpickled.
        """
        if self._folder is None:
            return None
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            found = self._folder.lstat()
        except OSError:
            return None
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        return self._folder if own else None


def prepare() -> None:
    """Create the folder that the workers share, and remove it at exit. For the process that starts the workers."""
    folder = tempfile.mkdtemp(prefix="modepath-verdicts-")
    os.environ[FOLDER] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _file(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
