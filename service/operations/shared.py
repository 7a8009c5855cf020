"""Numbers that all workers of a service share, by key: quotas, and the tallies of versions on trial.

They are in memory that workers inherit. A record lock of the operating system guards them: it costs microseconds, needs no
server, and ends with a process that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass

from service.operations import memory

SLOTS = 2048
TRIES, PAUSE_SECONDS = 200, 0.0001
NOBODY = bytes(8)


class LockedError(Exception):
    """Another process holds the lock, and does not go on."""


@dataclass(slots=True)
class Slot:
    """The numbers of one key; changes are stored when the lock is released."""

    values: list[float]
    new: bool  # True if the key had no slot before


class Shared:
    """A fixed count of numbers for each of up to SLOTS keys."""

    def __init__(self, file: int, count: int):
        """Map a file descriptor that `make` created, with `count` numbers for each key."""
        self._file = file
        self._slot = struct.Struct(f"=8s{count}d")
        self._map = mmap.mmap(file, SLOTS * self._slot.size)
        # A record lock belongs to a process, so it does not keep its threads apart.
        self._threads = threading.Lock()

    @classmethod
    def make(cls, variable: str, count: int) -> Shared:
        """Create the memory for all processes that are started from now on; the environment variable names it to them."""
        file = memory.shared_file(variable.lower(), SLOTS * struct.calcsize(f"=8s{count}d"))
        os.environ[variable] = str(file)
        return cls(file, count)

    @classmethod
    def inherited(cls, variable: str, count: int) -> Shared:
        """The memory of this service; of this process alone if it was started alone."""
        given = os.environ.get(variable)
        return cls(int(given), count) if given else cls.make(variable, count)

    @contextlib.contextmanager
    def locked(self, key: str) -> Generator[Slot]:
        """Hold the lock and the slot of a key of 8 hexadecimal digits.

        Raises:
            LockedError: another process holds the lock and does not go on.
        """
        if not self._threads.acquire(timeout=TRIES * PAUSE_SECONDS):  # another thread may wait for the processor
            raise LockedError
        with contextlib.ExitStack() as stack:
            stack.callback(self._threads.release)
            self._lock()
            try:
                place = self._place(key.encode())
                owner, *values = self._slot.unpack_from(self._map, place)
                slot = Slot(values, owner == NOBODY)
                yield slot
                self._slot.pack_into(self._map, place, key.encode(), *slot.values)
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def glance(self, key: str) -> list[float] | None:
        """The numbers of a key without the lock, each of them some recent value; None if it has none."""
        owner, *values = self._slot.unpack_from(self._map, self._place(key.encode()))
        return values if owner == key.encode() else None

    def _place(self, key: bytes) -> int:
        """Where a key's slot is: the first, from its hash on, that already belongs to it or is free."""
        first = int(key, 16) % SLOTS
        for number in range(SLOTS):
            place = (first + number) % SLOTS * self._slot.size
            if self._map[place : place + 8] in (key, NOBODY):
                return place
        # Keys that are not used any more keep their slots. The service was not restarted for thousands of them.
        return first * self._slot.size

    def _lock(self) -> None:
        for _ in range(TRIES):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(PAUSE_SECONDS)
            else:
                return
        raise LockedError
