"""Trials: a version is opened in a separate process before a worker opens it.

If the version hangs, crashes or takes all memory, only that process is lost. A worker starts one process that imports
the libraries once. It forks for each trial, and ends with the worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil  # comes with bentoml

from models_store import lineage
from models_store.errors import CorruptionError, ModepathError, ProviderError, StoreError
from models_store.graphs.runtime import default_threads
from models_store.store import Store, Version
from service.inference.batching import Batcher, QueueLimits
from service.inference.look import Candidate
from service.inference.modes.draws import Keyed
from service.inference.opening import Recipe, open_version, verify
from service.inference.policy import Known
from service.inference.verdicts import Refusal, RefusedError, Verdicts, refusal
from service.operations.memory import available_bytes

WATCH_SECONDS = 0.05
START_SECONDS = 60.0  # time for the forking process to import its libraries, once
NICENESS = 5  # trials run at a lower priority than requests
BOOT = "import sys; sys.path[:] = sys.argv[2:]; from service.inference.trial import serve_trials; serve_trials(int(sys.argv[1]))"
PARENT_DEATH = 1  # prctl option PR_SET_PDEATHSIG
NOT_SERVED = "is not served; a version served before keeps answering"
NOT_COMPARED = "cannot be compared with other ensembles (if a policy defends it, others do not answer until it is restored from a copy, or its folder removed)"
log = logging.getLogger("bentoml.modepath")


class Trial(Protocol):
    """Examines versions before they are opened. Implementations are thread-safe."""

    def opens(self, candidate: Candidate, recipe: Recipe) -> None:
        """Check that the version can be opened and answers.

        Raises:
            RefusedError: it cannot be opened, or does not answer; the reason was logged.
        """
        ...

    def known(self, candidate: Candidate) -> Known:
        """Return which networks the version holds.

        Raises:
            RefusedError: the version cannot be read; the reason was logged.
        """
        ...


class TrialError(ModepathError):
    """A version cannot be opened. The message is complete, so that it is logged without a traceback."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


def failed(
    verdicts: Verdicts, before: Refusal | None, error: Exception, candidate: Candidate, what: str, spent: float
) -> Refusal:
    """Log a failure, once for each activation and kind of error, and return until when the version is refused."""
    kind = error.kind if isinstance(error, TrialError) else type(error).__name__
    if verdicts.first(what, candidate.identity, candidate.token, kind):
        understood = isinstance(error, StoreError | ProviderError | OSError | TrialError)
        log.error("%s %s: %s", candidate, what, error, exc_info=None if understood else error)
    return refusal(before, str(error), candidate.token, spent)


def load_exactly(store: Store, candidate: Candidate) -> Version:
    """Load exactly the version whose manifest has the candidate's digest.

    Raises:
        StoreError: the version cannot be read, or was replaced since the store was read.
    """
    version = store.load(candidate.name, candidate.number)
    if version.digest != candidate.digest:
        raise CorruptionError(f"{candidate} was replaced while it was read; it will be read again.")
    return version


def known(store: Store, candidate: Candidate) -> Known:
    """Return which networks a version holds."""
    version = load_exactly(store, candidate)
    bank = version.manifest.bank
    return Known(lineage.marks(version), bank.points if bank else len(version.manifest.members))


class Direct:
    """Opens versions in this process, without trials: for programs that trust their versions."""

    def __init__(self, store: Store):
        self._store = store

    def opens(self, candidate: Candidate, recipe: Recipe) -> None:
        """See Trial."""

    def known(self, candidate: Candidate) -> Known:
        """See Trial; errors of reading are raised unchanged."""
        return known(self._store, candidate)


@dataclass(frozen=True, slots=True)
class _Request:
    root: Path
    candidate: Candidate
    recipe: Recipe | None  # None: do not open the version, only return which networks it holds
    limits: QueueLimits
    most_bytes: int  # memory that the trial may take


class Trials:
    """Runs trials in separate processes, each version once for all workers of the service."""

    def __init__(
        self,
        store: Store,
        limits: QueueLimits,
        verdicts: Verdicts,
        *,
        seconds: float,
        most_bytes: int | None,
        workers: int,
    ):
        """Create the object; the forking process starts with the first trial.

        Args:
            store: the store that holds the versions.
            limits: limits of the batches that will be run.
            verdicts: results shared with the other workers.
            seconds: time that a trial may take.
            most_bytes: memory that a trial may take; None: the memory that is free when it starts, divided by the
                number of workers plus one.
            workers: number of workers that will open the version.
        """
        self._store = store
        self._limits = limits
        self._verdicts = verdicts
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._workers = workers
        self._starting = threading.Lock()
        # The forking process, and the socket for its requests.
        self._forking: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def opens(self, candidate: Candidate, recipe: Recipe) -> None:
        """See Trial."""
        self._once(NOT_SERVED, candidate, recipe)

    def known(self, candidate: Candidate) -> Known:
        """See Trial."""
        found = self._once(NOT_COMPARED, candidate, None)
        assert isinstance(found, Known)
        return found

    def close(self) -> None:
        """End the forking process, and with it all trials."""
        with self._starting:
            self._end()

    def _once(self, what: str, candidate: Candidate, recipe: Recipe | None) -> object:
        key = f"{candidate.identity} {what}"
        with self._verdicts.turn(key):
            before = self._verdicts.read(key)
            if isinstance(before, Refusal):
                if before.holds(candidate.token):
                    raise RefusedError(before)
            elif before is not None:
                return before
            began = time.monotonic()
            try:
                found = self._run(candidate, recipe)
            except Exception as error:
                earlier = before if isinstance(before, Refusal) else None
                refused = failed(self._verdicts, earlier, error, candidate, what, time.monotonic() - began)
                self._verdicts.write(key, refused)
                raise RefusedError(refused) from None
            self._verdicts.write(key, found)
            return found

    def _run(self, candidate: Candidate, recipe: Recipe | None) -> object:
        most = self._most_bytes or available_bytes() // (self._workers + 1)
        ours, theirs = socket.socketpair()
        with theirs:
            connection = Connection(ours.detach())
            try:
                self._fork(theirs)
            except BaseException:
                connection.close()
                raise
        with connection:
            connection.send(_Request(self._store.root, candidate, recipe, self._limits, most))
            return self._watched(connection, most)

    def _fork(self, theirs: socket.socket) -> None:
        with self._starting:
            if self._forking is not None:
                with contextlib.suppress(OSError):
                    socket.send_fds(self._forking[1], [b"1"], [theirs.fileno()])
                    return
                self._end()  # the process has ended unexpectedly; clean up and start another
            self._forking = _started()
            socket.send_fds(self._forking[1], [b"1"], [theirs.fileno()])

    def _end(self) -> None:
        if self._forking is not None:
            process, asks = self._forking
            self._forking = None
            asks.close()
            process.kill()
            process.wait()

    def _watched(self, connection: Connection, most: int) -> object:
        """Return the result of a trial. Its process is killed at the end, or as soon as it exceeds a limit."""
        deadline = time.monotonic() + max(self._seconds, START_SECONDS)
        process: psutil.Process | None = None
        begun = False
        try:
            while True:
                if connection.poll(WATCH_SECONDS):
                    message: Any = connection.recv()
                    if not begun:
                        begun, deadline = True, time.monotonic() + self._seconds
                        process = _process(message)
                        continue
                    return _result(message)
                if time.monotonic() > deadline:
                    raise TrialError(
                        "hang",
                        f"it was not ready within {self._seconds:g} seconds (MODEPATH_LOAD_SECONDS): a member runs for ever, the disk does not respond, "
                        "or the time is too short. It is tried again after its next activation, and periodically.",
                    )
                if process is not None and _resident(process) > most:
                    raise TrialError("memory", _too_large(most))
        except (EOFError, ConnectionError):
            raise TrialError(
                "crash",
                "its trial process ended without an answer: the system killed it, probably for lack of memory, or ONNX Runtime crashed on it. "
                "Publish another version; this one is tried again after its next activation, and periodically.",
            ) from None
        finally:
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def _process(number: int) -> psutil.Process | None:
    """Return the process, or None if it has already ended; its answer may still arrive."""
    try:
        return psutil.Process(number)
    except psutil.Error:
        return None


def _resident(process: psutil.Process) -> int:
    """Return the resident memory of a process in bytes; 0 if it has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _too_large(most: int) -> str:
    return (
        f"it needs more than the {most >> 20} MiB that one version may take (MODEPATH_LOAD_BYTES; by default a share of the free memory). "
        "Give the service more memory, or fewer workers."
    )


def _result(message: Any) -> object:
    kind, content = message
    if kind == "found":
        return content
    raise TrialError(kind, content)


def _started() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the forking process; return it and the socket for its requests. It ends when the socket is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", BOOT, str(theirs.fileno()), *sys.path],
            pass_fds=[theirs.fileno()],
            # Keeps the process single-threaded, because one with several threads cannot be forked safely.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must reach only the service, which then closes the socket
        )
    return process, ours


def serve_trials(descriptor: int) -> None:
    """Fork a trial for each connection received, until the worker ends. Runs in the forking process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended trials leave no zombies
    logging.disable()  # the worker logs
    asks = socket.socket(fileno=descriptor)
    while True:
        _, descriptors, _, _ = socket.recv_fds(asks, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            asks.close()
            _answer_and_end(descriptors[0])
        os.close(descriptors[0])


def _answer_and_end(descriptor: int) -> None:
    """Run a trial and exit in every case: a trial must never return into the loop of the forking process."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(AttributeError, OSError):  # only Linux has these
            ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
            Path("/proc/self/oom_score_adj").write_text("1000")
        os.nice(NICENESS)
        _answer(Connection(descriptor))
    finally:
        os._exit(0)


def _answer(connection: Connection) -> None:
    request: _Request = connection.recv()
    connection.send(os.getpid())
    try:
        answer = "found", _found(request)
    except TrialError as error:
        answer = error.kind, str(error)
    except MemoryError:
        answer = "memory", _too_large(request.most_bytes)
    except (StoreError, ProviderError, OSError) as error:
        answer = type(error).__name__, str(error)
    except Exception as error:
        answer = type(error).__name__, f"its trial failed\n{traceback.format_exc()}"
    connection.send(answer)


def _found(request: _Request) -> object:
    store, recipe = Store(request.root), request.recipe
    if recipe is None:
        return known(store, request.candidate)
    version = load_exactly(store, request.candidate)
    used = [name for name in version.manifest.files if name.startswith(("members/", "bank/"))]
    if sum((version.folder / name).lstat().st_size for name in used) > request.most_bytes:
        raise TrialError("memory", _too_large(request.most_bytes))
    verify(store, version, recipe)
    batcher = Batcher(request.limits, recipe.threads or default_threads())
    stand_in = Keyed(secrets.token_bytes(16), 3600, None)
    open_version(version, recipe, stand_in, batcher.warm)
    return True
