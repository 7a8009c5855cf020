"""What the process that starts the workers and they themselves know of one another.

The board is memory that all of them share. Each worker has a line on it, where its event loop counts once a second; the
process that started it sees there that it stands still. It is no file: no full disk and no cleaner of /tmp reaches it.
What touches BentoML's own supervisor (circus) is in bentoml_internals.py.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Collection

SHARED = "MODEPATH_SUPERVISOR"  # the supervisor's process, and the board's file descriptor, which workers inherit
SECONDS = 1.0  # between two counts, and between two looks at them
STARTING_TICKS = 120  # until a worker's first count: it imports, and loads ensembles
LINES = 1024
_line = struct.Struct("=qqq")  # process, count, whether its metrics are incomplete

log = logging.getLogger("bentoml.modepath")


class Board:
    """Memory that the supervisor and its workers share."""

    def __init__(self, file: int):
        """On the file descriptor that the supervisor made."""
        self._map = mmap.mmap(file, LINES * _line.size)

    @classmethod
    def make(cls) -> Board:
        """In the supervisor: make one, for the workers that it starts from now on."""
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("modepath")
        else:
            with tempfile.TemporaryFile() as made:
                file = os.dup(made.fileno())
        os.write(file, bytes(LINES * _line.size))
        os.set_inheritable(file, True)
        os.environ[SHARED] = f"{os.getpid()}:{file}"
        return cls(file)

    def write(self, line: int, process: int, count: int, incomplete: bool) -> None:
        """In a worker: its own line."""
        self._map[line * _line.size : (line + 1) * _line.size] = _line.pack(process, count, incomplete)

    def read(self) -> dict[int, tuple[int, bool]]:
        """In the supervisor: of each process that wrote one, its count, and whether its metrics are incomplete."""
        return {
            process: (count, bool(incomplete)) for process, count, incomplete in _line.iter_unpack(self._map) if process
        }


class Watch:
    """In the supervisor: how many of its own ticks each worker has stood still for.

    Ticks, not seconds: while the machine sleeps, or the whole group of processes is stopped, there are none.
    """

    def __init__(self, board: Board, ticks: int):
        """A worker may stand still for so many ticks."""
        self._board = board
        self._ticks = ticks
        self._still: dict[int, tuple[int, int]] = {}  # by process: its last count, and ticks since it changed

    def tick(self, processes: Collection[int]) -> list[int]:
        """Look at these workers, and give those that hang."""
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
        """How many workers have metrics in their memory only."""
        found = self._board.read()
        return sum(found[process][1] for process in self._still if process in found)


class Pulse:
    """In a worker: counts on its board, looks after its files, and ends when its supervisor is gone.

    It counts only while its members get on: a network that runs without end for some image holds no event loop up.
    """

    def __init__(self, line: int, look: Callable[[], bool], busy_seconds: Callable[[], float], grace_seconds: float):
        """Begin nothing yet.

        Args:
            line: on the board, the worker's own.
            look: called once a second, says whether its metrics are complete.
            busy_seconds: for how long its members have worked on one and the same batch.
            grace_seconds: until it ends when its supervisor is gone.
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
        """Begin, on the event loop that runs."""
        self._beat(asyncio.get_running_loop())
        threading.Thread(target=self._watch, name="pulse", daemon=True).start()

    def incomplete(self) -> int:
        """How many workers have metrics in their memory only, as far as this one knows."""
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
        # Not on the event loop: files may be slow, and a loop that hangs must end too when nobody is left to kill it.
        while self._supervisor is None or os.getppid() == self._supervisor:
            try:
                self._complete = self._look()
            except Exception:
                log.exception("The worker could not look after its metrics.")
            time.sleep(SECONDS)
        self.orphaned = True
        log.error("The process that started this worker is gone: the worker finishes its requests and ends.")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._grace_seconds)
        os._exit(1)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True
