"""A version is opened in a process of its own before a worker opens it: one that hangs, crashes or takes all memory ends that process alone.

A worker starts one process that has the libraries imported; it forks for each trial, and ends with the worker.
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
from service.inference.draws import Keyed
from service.inference.look import Candidate
from service.inference.opening import Recipe, open_version
from service.inference.policy import Known
from service.inference.verdicts import Refusal, RefusedError, Verdicts, refusal
from service.operations.memory import available_bytes

WATCH_SECONDS = 0.05
START_SECONDS = 60.0  # for the process that forks to import its libraries, once
NICENESS = 5  # requests come first
BOOT = "import sys; sys.path[:] = sys.argv[2:]; from service.inference.trial import serve_trials; serve_trials(int(sys.argv[1]))"
PARENT_DEATH = 1  # of prctl: PR_SET_PDEATHSIG
NOT_SERVED = "is not served, and what was served before goes on"
NOT_COMPARED = "cannot be compared with other ensembles (where a policy defends it, others do not answer until it is restored from a copy, or its folder removed)"
log = logging.getLogger("bentoml.modepath")


class Trial(Protocol):
    """Finds out about versions. Several threads may ask at once."""

    def opens(self, candidate: Candidate, recipe: Recipe) -> None:
        """Return if the version can be opened and answers.

        Raises:
            RefusedError: not, and that was logged.
        """
        ...

    def known(self, candidate: Candidate) -> Known:
        """Which networks it holds.

        Raises:
            RefusedError: that cannot be read, which was logged.
        """
        ...


class TrialError(ModepathError):
    """Why a version cannot be opened; the message says it all, so that the log needs no traceback."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


def failed(
    verdicts: Verdicts, before: Refusal | None, error: Exception, candidate: Candidate, what: str, spent: float
) -> Refusal:
    """Log a failure, once for each activation and kind of error, and say when the version is tried again."""
    kind = error.kind if isinstance(error, TrialError) else type(error).__name__
    if verdicts.first(what, candidate.identity, candidate.token, kind):
        understood = isinstance(error, StoreError | ProviderError | OSError | TrialError)
        log.error("%s %s: %s", candidate, what, error, exc_info=None if understood else error)
    return refusal(before, str(error), candidate.token, spent)


def load_exactly(store: Store, candidate: Candidate) -> Version:
    """Read that version and no other.

    Raises:
        StoreError: it cannot be read, or was replaced since it was found.
    """
    version = store.load(candidate.name, candidate.number)
    if version.digest != candidate.digest:
        raise CorruptionError(f"{candidate} was replaced while it was read; it is looked at again.")
    return version


def known(store: Store, candidate: Candidate) -> Known:
    """What a version holds."""
    version = load_exactly(store, candidate)
    bank = version.manifest.bank
    return Known(lineage.marks(version), bank.points if bank else len(version.manifest.members))


class Direct:
    """In this process, without trials: for programs that open versions they trust."""

    def __init__(self, store: Store):
        self._store = store

    def opens(self, candidate: Candidate, recipe: Recipe) -> None:
        """See Trial."""

    def known(self, candidate: Candidate) -> Known:
        """See Trial; raises what comes."""
        return known(self._store, candidate)


@dataclass(frozen=True, slots=True)
class _Request:
    root: Path
    candidate: Candidate
    recipe: Recipe | None  # None: its networks are asked for
    limits: QueueLimits
    most_bytes: int  # of memory


class Trials:
    """Trials in processes of their own, each version once for all workers of the service."""

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
        """Nothing is started yet.

        Args:
            store: where the versions lie.
            limits: of the batches that will be run.
            verdicts: shared with the other workers.
            seconds: that a trial may take.
            most_bytes: memory that it may take; None: its share of what is left when it begins, one for each worker and one for itself.
            workers: that will open the version.
        """
        self._store = store
        self._limits = limits
        self._verdicts = verdicts
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._workers = workers
        self._starting = threading.Lock()
        self._forking: tuple[subprocess.Popen[bytes], socket.socket] | None = None  # and how it is asked

    def opens(self, candidate: Candidate, recipe: Recipe) -> None:
        """See Trial."""
        self._once(NOT_SERVED, candidate, recipe)

    def known(self, candidate: Candidate) -> Known:
        """See Trial."""
        found = self._once(NOT_COMPARED, candidate, None)
        assert isinstance(found, Known)
        return found

    def close(self) -> None:
        """End the process that forks, and with it all trials."""
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
                self._end()  # somebody else ended it
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
        """What the trial's process says, which is ended when it goes beyond its limits."""
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
                        f"it was not ready within {self._seconds:g} seconds (MODEPATH_LOAD_SECONDS): a member computes without end, the disk does not "
                        "answer, or the time is too short for it. It is tried again when it is activated anew, and now and then.",
                    )
                if process is not None and _resident(process) > most:
                    raise TrialError("memory", _too_large(most))
        except (EOFError, ConnectionError):
            raise TrialError(
                "crash",
                "the process that tried it ended without an answer: the system ended it, likely for lack of memory, or ONNX Runtime crashed on it. "
                "Publish another version; this one is tried again when it is activated anew, and now and then.",
            ) from None
        finally:
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def _process(number: int) -> psutil.Process | None:
    """None where it has ended already; its answer may be on its way."""
    try:
        return psutil.Process(number)
    except psutil.Error:
        return None


def _resident(process: psutil.Process) -> int:
    """Bytes that it has in memory; 0 where it has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _too_large(most: int) -> str:
    return (
        f"it needs more than the {most >> 20} MiB that one version may take (MODEPATH_LOAD_BYTES; by default a share of the memory that is left). "
        "Give the service more memory, or fewer workers."
    )


def _result(message: Any) -> object:
    kind, content = message
    if kind == "found":
        return content
    raise TrialError(kind, content)


def _started() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process that forks, and the socket that it is asked through. It ends when that is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", BOOT, str(theirs.fileno()), *sys.path],
            pass_fds=[theirs.fileno()],
            # A process of several threads could not be forked safely.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the service, which then closes the socket
        )
    return process, ours


def serve_trials(descriptor: int) -> None:
    """In the process that forks: a trial for each connection that comes, until the worker is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended trials need no burial
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
    """Whatever happens: a trial must never go on as the process that forks."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(AttributeError, OSError):  # Linux has these
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
    store.verify(version)
    batcher = Batcher(request.limits, recipe.threads or default_threads())
    stand_in = Keyed(secrets.token_bytes(16), 3600, None)
    open_version(version, recipe, stand_in, batcher.warm)
    return True
