"""Draws the network that answers each row in the modes `random` and `keyed`.

`random` uses the operating system's entropy: no seed or log reveals a draw, no restart repeats one, and forked
processes draw independently. `keyed` uses a keyed hash of the query: the same pixels get the same answer until the key
changes. A difference of one level in one pixel makes another query. So near-duplicates of an image draw other networks,
and a client can average their answers, as it can in `random`.
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

from models_store.inputs import kinds
from service.http.images import Images

Choice = NDArray[np.int64]  # (batch,): the index of the network for each row
LEVELS = 255  # pixels are rounded to 8 bits before hashing, so that invisible changes do not select another network


class Draw(Protocol):
    """Chooses a network for each row of a request."""

    def __call__(self, images: Images, count: int, asked: bytes) -> Choice:
        """Return (batch,) indices in [0, count). `asked` identifies the ensemble version and the caller."""
        ...


def at_random(images: Images, count: int, asked: bytes) -> Choice:
    """Draw independently for each row; see Draw."""
    return np.array([secrets.randbelow(count) for _ in images], np.int64)


def quantised(image: Images) -> NDArray[np.uint8]:
    """Round an image in [0, 1] to the levels of an 8-bit file, 0 to 255."""
    return np.rint(image * LEVELS).astype(np.uint8)


def _content(row: Images) -> bytes:
    """What the answer to one image or text depends on; token ids are exact."""
    return quantised(row).tobytes() if row.dtype.kind == "f" else kinds.identity(row)


class Keyed:
    """Draws by a keyed hash. The key changes after `seconds`, and also after `rows` rows if that is set."""

    def __init__(self, secret: bytes, seconds: float, rows: int | None, now: Callable[[], float] = time.time):
        """Processes with the same `secret` draw alike only if `rows` is None.

        Otherwise each process counts its own rows, and starts from a key of its own.
        """
        if rows:  # otherwise a restart would reset the count and reuse earlier keys
            secret += secrets.token_bytes(16)
        self._secret = hashlib.blake2b(secret).digest()  # gives the length that BLAKE2b accepts as a key
        self._seconds, self._rows, self._now = seconds, rows, now
        self._lock = threading.Lock()
        self._answered = 0
        self._turn = 0

    def __call__(self, images: Images, count: int, asked: bytes) -> Choice:
        """See Draw."""
        key = self._key(len(images))
        return np.array([self._index(key, asked, _content(image), count) for image in images], np.int64)

    def order(self, count: int) -> list[int]:
        """Return the numbers 0 … count − 1 in an order that depends only on the secret.

        With it, pools that hold only some of the networks hold the same ones in every worker.
        """
        seed = hashlib.blake2b(b"order", key=self._secret).digest()
        return random.Random(seed).sample(range(count), count)

    def _key(self, rows: int) -> bytes:
        with self._lock:
            # Never an earlier turn: after the clock was set back, an earlier key would be used a second time.
            self._turn = turn = max(self._turn, int(self._now() // self._seconds))
            counted = self._answered // self._rows if self._rows else 0
            self._answered += rows
        return hashlib.blake2b(f"{turn} {counted}".encode(), key=self._secret, digest_size=32).digest()

    @staticmethod
    def _index(key: bytes, asked: bytes, content: bytes, count: int) -> int:
        said = hashlib.blake2b(len(asked).to_bytes(4, "big") + asked + content, key=key, digest_size=16)
        # With 128 bits, the remainder favours no network by more than 2⁻¹¹⁶.
        return int.from_bytes(said.digest(), "big") % count
