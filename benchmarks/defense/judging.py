"""What an attack is worth: its images asked again, many times, of the arm that it attacked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.defense.arms import Oracle


def judged(oracle: Oracle, images: NDArray[np.float32], labels: NDArray[np.int64], again: int) -> dict[str, Any]:
    """How many of so many answers to each image are wrong: `wrong`, of `asked`.

    Where there is a key, the answers are of as many keys, and `now` says which images are answered wrongly before it turns: under the key that was attacked.
    """
    if oracle.repeats and oracle.turn is None:
        again = 1
    wrong = np.zeros(len(images), int)
    now = None if oracle.turn is None else (oracle.ask(images).argmax(1) != labels).astype(int).tolist()
    for _ in range(again):
        if oracle.turn is not None:
            oracle.turn()
        wrong += oracle.ask(images).argmax(1) != labels
    return {"now": now, "wrong": wrong.tolist(), "asked": again}


def within(images: NDArray[np.float32], start: NDArray[np.float32], epsilon: float) -> NDArray[np.float32]:
    """Moved into the L∞ ball around where they began."""
    return np.clip(images, start - epsilon, start + epsilon).clip(0, 1).astype(np.float32)
