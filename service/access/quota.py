"""Quotas in rows per minute, correct over all workers of a service.

A quota is a bucket that holds the rows of one minute and fills up evenly; service/operations/shared.py keeps the buckets.
Replicas on several machines count for themselves; a proxy in front of them can count for all.
"""

from __future__ import annotations

import time

from service.operations.shared import Shared

SHARED = "MODEPATH_QUOTA"  # names the buckets to workers
NUMBERS = 2  # rows that are left; time of that number, in seconds of the monotonic clock


class Quota:
    """The buckets of all keys."""

    def __init__(self, buckets: Shared):
        self._buckets = buckets

    @classmethod
    def make(cls) -> Quota:
        """Create full buckets for all workers that are started from now on. Called in the process that starts them."""
        return cls(Shared.make(SHARED, NUMBERS))

    @classmethod
    def shared(cls) -> Quota:
        """The buckets of this service; of this process alone if it was started alone."""
        return cls(Shared.inherited(SHARED, NUMBERS))

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
            LockedError: another process holds the lock on the buckets, and does not go on.
        """
        now = time.monotonic() if now is None else now
        with self._buckets.locked(key) as bucket:
            left, since = (float(per_minute), now) if bucket.new else bucket.values
            left = min(float(per_minute), left + max(0.0, now - since) * per_minute / 60)
            wanted = max(rows, 1) if rows >= 0 else rows
            taken = wanted <= left
            bucket.values = [min(float(per_minute), left - rows) if taken else left, now]
        return 0.0 if taken else (wanted - left) * 60 / per_minute
