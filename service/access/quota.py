"""Quotas in rows per minute, correct over all workers of a service.

A quota is a bucket that holds the rows of one minute and fills up evenly. The buckets are in memory that all workers share, and
a record lock of the operating system guards them: it costs microseconds, needs no server, and ends with a process that dies.
Replicas on several machines count for themselves; a proxy in front of them can count for all.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time

from service.operations import memory

SHARED = "MODEPATH_QUOTA"  # the file descriptor of the buckets, which workers inherit
SLOTS = 2048  # twice as many as keys
TRIES, PAUSE_SECONDS = 200, 0.0001
_slot = struct.Struct(
    "=8sdd"
)  # id of the key; rows that are left; time of that number, in seconds of the monotonic clock


class LockedError(Exception):
    """Another process holds the lock on the buckets, and does not go on."""


class Quota:
    """The buckets of all keys."""

    def __init__(self, file: int):
        """Map the file descriptor that `make` created."""
        self._file = file
        self._map = mmap.mmap(file, SLOTS * _slot.size)

    @classmethod
    def make(cls) -> Quota:
        """Create full buckets for all workers that are started from now on. Called in the process that starts them."""
        file = memory.shared_file("modepath-quota", SLOTS * _slot.size)
        os.environ[SHARED] = str(file)
        return cls(file)

    @classmethod
    def shared(cls) -> Quota:
        """The buckets of this service; of this process alone if it was started alone."""
        given = os.environ.get(SHARED)
        return cls(int(given)) if given else cls.make()

    def take(self, key: str, rows: int, per_minute: int, now: float | None = None) -> float:
        """Take rows out of a key's bucket, all or none.

        Args:
            key: id of the key, 8 characters.
            rows: how many; 0 only asks whether any are left. Negative ones are given back.
            per_minute: the quota.
            now: time in seconds of the monotonic clock, which all processes of a machine share.

        Returns:
            0 if they were taken, else the seconds until there are so many. More than `per_minute` there never are.

        Raises:
            LockedError: another process holds the lock and does not go on.
        """
        now = time.monotonic() if now is None else now
        self._lock()
        try:
            place = self._place(key.encode())
            owner, left, since = _slot.unpack_from(self._map, place)
            if owner == bytes(8):
                left, since = float(per_minute), now
            left = min(float(per_minute), left + max(0.0, now - since) * per_minute / 60)
            wanted = max(rows, 1) if rows >= 0 else rows
            if wanted > left:
                return (wanted - left) * 60 / per_minute
            _slot.pack_into(self._map, place, key.encode(), min(float(per_minute), left - rows), now)
            return 0.0
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _place(self, key: bytes) -> int:
        """Where a key's bucket is: in the first slot from its hash on that is its own or free."""
        first = int(key, 16) % SLOTS
        for number in range(SLOTS):
            place = (first + number) % SLOTS * _slot.size
            if _slot.unpack_from(self._map, place)[0] in (key, bytes(8)):
                return place
        # Keys that were revoked since the start keep their slots. The service was not restarted for thousands of them.
        return first * _slot.size

    def _lock(self) -> None:
        for _ in range(TRIES):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(PAUSE_SECONDS)
            else:
                return
        raise LockedError
