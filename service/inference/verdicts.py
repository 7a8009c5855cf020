"""What was found out about versions: whether one can be opened, and when it is tried again. The workers of a service share it.

It lies in a folder that the process which starts the workers makes, as service/operations/metrics.py does. Where the folder is lost or cannot be
written, each worker goes on by itself.
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
COSTLY = 10.0  # times what a failed trial took, it is not repeated
DEATH_PAUSE = 30.0  # seconds after the death of a worker: it costs the requests that the worker had


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a version is not opened, and until when."""

    why: str
    token: str | None  # of the activation it was tried for
    pause: float  # seconds
    again: float  # of time.monotonic, which the processes of a machine share

    def holds(self, token: str | None) -> bool:
        """False when it is to be tried again: it was activated anew, or the pause is over."""
        return token == self.token and time.monotonic() < self.again


def refusal(before: Refusal | None, why: str, token: str | None, spent: float) -> Refusal:
    """The pause grows from one failure to the next, and is long where a trial was.

    Args:
        before: the failure before this one.
        why: it failed.
        token: of the activation.
        spent: seconds until it failed.
    """
    pause = FIRST_PAUSE if before is None or before.token != token else min(2 * before.pause, MAX_PAUSE)
    pause = max(pause, COSTLY * spent)
    return Refusal(why, token, pause, time.monotonic() + pause)


class RefusedError(ModepathError):
    """It was tried, by this worker or another, and is not to be tried again now."""

    def __init__(self, refusal: Refusal):
        super().__init__(refusal.why)
        self.refusal = refusal


class Verdicts:
    """Records by name, and turns: one worker at a time finds out about one thing."""

    def __init__(self, folder: Path | None):
        """Args: folder: shared by the workers; None: these verdicts are this process's alone."""
        self._folder = folder
        self._own: dict[str, object] = {}

    @classmethod
    def shared(cls) -> Verdicts:
        """Those of the service that this process is a worker of."""
        folder = os.environ.get(FOLDER)
        return cls(Path(folder) if folder else None)

    @contextlib.contextmanager
    def turn(self, key: str) -> Generator[None]:
        """Wait until no other worker is at it. The system ends the turn of a worker that dies."""
        with contextlib.ExitStack() as stack:
            if (folder := self._usable()) is not None:
                with contextlib.suppress(OSError):
                    lock = stack.enter_context((folder / f"{_file(key)}.lock").open("w"))
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read(self, key: str) -> object:
        """What was recorded; None: nothing."""
        if (folder := self._usable()) is not None:
            # Whatever a damaged pickle raises: then it is found out again.
            with contextlib.suppress(Exception):
                return pickle.loads((folder / _file(key)).read_bytes())
        return self._own.get(key)

    def write(self, key: str, record: object) -> None:
        """Record something for all workers."""
        self._own[key] = record
        if (folder := self._usable()) is not None:
            with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(pickle.dumps(record))
                file.flush()
                Path(file.name).replace(folder / _file(key))

    @contextlib.contextmanager
    def surviving(self, key: str, token: str | None) -> Generator[None]:
        """Do what may cost this process its life. Where it cost others theirs, it is not done again before a pause is over.

        Raises:
            RefusedError: that pause is not over.
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
        """Is this the first worker to say so? The log names each thing once."""
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
        """The folder, made again where it was cleaned away. What lies in it is unpickled: it must be nobody else's."""
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
    """In the process that starts the workers: make the folder that they will share, and remove it at the end."""
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
