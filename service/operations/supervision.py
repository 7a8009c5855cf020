"""Supervision: the process that starts the workers, the supervisor, detects workers that hang.

The board is memory that all these processes share. Each worker has a line on it, and its event loop increments a
counter there once a second. If the counter stops, the supervisor knows that the worker hangs. The board is not a file,
so neither a full disk nor a cleaner of /tmp affects it. Changes to BentoML's own supervisor (circus) are in
bentoml_internals.py.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Collection

from service.operations import memory

SHARED = "MODEPATH_SUPERVISOR"  # process id of the supervisor, and the board's file descriptor, which workers inherit
SECONDS = 1.0  # interval in which workers count, and in which the supervisor checks the counts
STARTING_TICKS = 120  # ticks until a worker's first count: it imports modules and loads ensembles
LINES = 1024
_line = struct.Struct("=qqq")  # process id, count, whether its metrics are incomplete

log = logging.getLogger("bentoml.modepath")


class Board:
    """Memory that the supervisor and its workers share."""

    def __init__(self, file: int):
        """Map the file descriptor that the supervisor created."""
        self._map = mmap.mmap(file, LINES * _line.size)

    @classmethod
    def make(cls) -> Board:
        """Create a board for all workers that are started from now on. Called in the supervisor."""
        file = memory.shared_file("modepath", LINES * _line.size)
        os.environ[SHARED] = f"{os.getpid()}:{file}"
        return cls(file)

    def write(self, line: int, process: int, count: int, incomplete: bool) -> None:
        """Write a worker's line. Called in that worker."""
        self._map[line * _line.size : (line + 1) * _line.size] = _line.pack(process, count, incomplete)

    def read(self) -> dict[int, tuple[int, bool]]:
        """Return, by process id, the count of each worker and whether its metrics are incomplete."""
        return {
            process: (count, bool(incomplete)) for process, count, incomplete in _line.iter_unpack(self._map) if process
        }


class Watch:
    """In the supervisor: counts for how many ticks each worker's counter has not changed.

    It counts its own ticks, not seconds: there are none while the machine sleeps or all processes are stopped.
    """

    def __init__(self, board: Board, ticks: int):
        """A worker hangs if its counter has not changed for `ticks` ticks."""
        self._board = board
        self._ticks = ticks
        self._still: dict[int, tuple[int, int]] = {}  # by process id: last count, and ticks since it changed

    def tick(self, processes: Collection[int]) -> list[int]:
        """Check the workers with these process ids, and return those that hang. Call it once per tick."""
        found = self._board.read()
        before = self._still
        self._still = {}
        hanging: list[int] = []
        for process in processes:
            count = found[process][0] if process in found else -1
            last, ticks = before.get(process, (count, -1))
            ticks = ticks + 1 if last == count else 0
            self._still[process] = (count, ticks)
            if ticks >= (STARTING_TICKS if count < 0 else self._ticks):
                hanging.append(process)
        return hanging

    def incomplete(self) -> int:
        """Return how many workers have metrics that are only in their memory."""
        found = self._board.read()
        return sum(found[process][1] for process in self._still if process in found)


class Pulse:
    """In a worker: increments its counter, checks its metric files, and ends the worker if the supervisor has ended.

    The counter also stops while one batch runs too long: a network that never finishes does not block the event loop.
    """

    def __init__(self, line: int, look: Callable[[], bool], busy_seconds: Callable[[], float], grace_seconds: float):
        """Create the object; `start` begins counting.

        Args:
            line: the worker's line on the board.
            look: called once a second; returns whether the worker's metrics are complete.
            busy_seconds: returns the time in seconds that the longest-running task of a batch has taken so far.
            grace_seconds: time until the worker ends after its supervisor has ended.
        """
        self._busy_seconds = busy_seconds
        self._line = line
        self._look = look
        self._grace_seconds = grace_seconds
        self._complete = True
        self._count = 0
        self.orphaned = False
        supervisor, _, file = os.environ.get(SHARED, "").partition(":")
        self._supervisor = int(supervisor) if supervisor else None
        self._board = Board(int(file)) if file and line < LINES else None

    def start(self) -> None:
        """Start counting on the running event loop."""
        self._beat(asyncio.get_running_loop())
        threading.Thread(target=self._watch, name="pulse", daemon=True).start()

    def incomplete(self) -> int:
        """Return how many workers have metrics that are only in their memory, as far as this worker knows."""
        if self._board is None or self.orphaned:
            return 0 if self._complete else 1
        return sum(incomplete for process, (_, incomplete) in self._board.read().items() if _exists(process))

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._busy_seconds() < SECONDS:
            self._count += 1
        if self._board is not None:
            self._board.write(self._line, os.getpid(), self._count, not self._complete)
        loop.call_later(SECONDS, self._beat, loop)

    def _watch(self) -> None:
        # Not on the event loop: files may be slow, and a worker whose loop hangs must end even without a supervisor.
        while self._supervisor is None or os.getppid() == self._supervisor:
            try:
                self._complete = self._look()
            except Exception:
                log.exception("The worker could not check its metrics.")
            time.sleep(SECONDS)
        self.orphaned = True
        log.error("The process that started this worker has ended: the worker finishes its requests and ends.")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._grace_seconds)
        os._exit(1)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True
