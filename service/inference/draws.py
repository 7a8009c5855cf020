"""Which network answers a query, where each query gets one of its own.

`random`: from the operating system's entropy, so that no seed, log or restart tells or repeats it, and processes that were forked
draw apart. `keyed`: a keyed hash of what was asked, so that the same pixels get the same answer until the key turns. One level of one pixel
is another question: near-duplicates of an image draw other networks, and their answers can be averaged like those of `random`.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.http.images import Images

Choice = NDArray[np.int64]  # (batch,): an index of a network for each row
LEVELS = 255  # pixels are rounded to 8 bits before they are hashed, so that invisible changes select no other network


class Draw(Protocol):
    """Chooses a network for each row of a request."""

    def __call__(self, images: Images, count: int, asked: bytes) -> Choice:
        """(batch,) indices in [0, count). `asked` names what is asked in addition to the images, and who asks."""
        ...


def at_random(images: Images, count: int, asked: bytes) -> Choice:
    """See Draw."""
    return np.array([secrets.randbelow(count) for _ in images], np.int64)


def quantised(image: Images) -> NDArray[np.uint8]:
    """An image in [0, 1] in the levels of an 8-bit file."""
    return np.rint(image * LEVELS).astype(np.uint8)


class Keyed:
    """Draws by a hash under a key that turns after some time, or after so many rows."""

    def __init__(self, secret: bytes, seconds: float, rows: int | None, now: Callable[[], float] = time.time):
        """Processes with one secret draw alike, as long as they turn by time alone: each counts its own rows, and begins elsewhere."""
        if rows:  # or a restart would begin to count anew, and repeat the keys of before
            secret += secrets.token_bytes(16)
        self._secret = hashlib.blake2b(secret).digest()  # of the length that BLAKE2b takes as a key
        self._seconds, self._rows, self._now = seconds, rows, now
        self._lock = threading.Lock()
        self._answered = 0
        self._turn = 0

    def __call__(self, images: Images, count: int, asked: bytes) -> Choice:
        """See Draw."""
        key = self._key(len(images))
        return np.array([self._index(key, asked, quantised(image), count) for image in images], np.int64)

    def order(self, count: int) -> list[int]:
        """The numbers 0 … count − 1 in an order of this key's: for pools that hold some networks only, and must be alike."""
        seed = hashlib.blake2b(b"order", key=self._secret).digest()
        return random.Random(seed).sample(range(count), count)

    def _key(self, rows: int) -> bytes:
        with self._lock:
            # The latest seen: with a clock that is set back, an earlier key would answer its questions a second time.
            self._turn = turn = max(self._turn, int(self._now() // self._seconds))
            counted = self._answered // self._rows if self._rows else 0
            self._answered += rows
        return hashlib.blake2b(f"{turn} {counted}".encode(), key=self._secret, digest_size=32).digest()

    @staticmethod
    def _index(key: bytes, asked: bytes, pixels: NDArray[np.uint8], count: int) -> int:
        said = hashlib.blake2b(len(asked).to_bytes(4, "big") + asked + pixels.tobytes(), key=key, digest_size=16)
        # 128 bits, so that the remainder favours no network by more than 2⁻¹¹⁶.
        return int.from_bytes(said.digest(), "big") % count
