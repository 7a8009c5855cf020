"""Whether a network answers each image by itself.

A server puts the images of several clients into one batch. So the answer for an image must not depend on the images
next to it, on their order or on how many there are. Training checks a network before its first epoch and each member
at publication; the import of foreign models checks each file. All of them ask here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Answer = Callable[[Images], NDArray[np.float32]]  # (batch, C, H, W) in [0, 1] -> (batch, classes)

# Another batch size may choose another kernel, whose sums are rounded otherwise. Measured by what differs between images
# as well: the logits of an untrained network may all be alike.
_ROUNDING = 1e-4  # times the largest |logit|
_SHARE = 1e-3  # times the range of a logit over the images
_CHAOS = 10.0  # times what rounding of the image itself moves; see `rounding`


def probes(shape: tuple[int, int, int], images: Images | None = None) -> Images:
    """Images to ask with: up to two given ones, noise, faint noise, black and white, (batch, C, H, W).

    They differ in brightness on purpose: what is shared by a batch, as its mean or its largest pixel, then changes with
    the images in it.
    """
    noise = np.random.default_rng(0).random((4, *shape), dtype=np.float32)
    given = noise[2:] if images is None or len(images) == 0 else images[:2]
    extremes = np.stack([np.zeros(shape, np.float32), np.ones(shape, np.float32)])
    return np.concatenate([given, noise[:1], 0.1 * noise[1:2], extremes]).astype(np.float32)


def fault(answer: Answer, images: Images) -> str | None:
    """Run a network on the images together, alone, in another order, in pairs and among many, and compare.

    Args:
        answer: the network; what it raises counts as a fault.
        images: at least three, as `probes` gives them.

    Returns:
        What is wrong, as the rest of a sentence that begins with the network; None where each row is answered by itself.
    """
    asked = _Asked(answer)
    count = len(images)
    together = asked(images)
    moved = asked(nudged(images))
    again = asked(images)
    reversed_order = asked(images[::-1])
    alone = [asked(images[i : i + 1]) for i in range(count)]
    pairs = [asked(images[[i, (i + 1) % count]]) for i in range(count)]
    many = asked(np.concatenate([images, np.roll(images, 1, axis=0), images[:1]]))
    if asked.fault is not None:
        return asked.fault
    if _differ(together, again):
        return "answers the same images differently each time: something in it is random, also in eval mode"
    noise = np.abs(moved.astype(np.float64) - together)
    others = [reversed_order[::-1], np.concatenate(alone), np.stack([pair[0] for pair in pairs]), many[:count]]
    off = [_differ(together, other, noise) for other in others]
    if not any(off):
        return None
    if off[0]:
        return f"answers an image differently at another position in the batch (a logit moves by {off[0]:.2g})"
    return f"answers an image differently alone and with other images in the batch (a logit moves by {max(off):.2g})"


def rounding(answer: Answer, images: Images) -> NDArray[np.float64]:
    """How far the answers move when the images are rounded otherwise, (batch, classes).

    A deep network without training can amplify the last bit of an image, or of anything that it computes, to all of its answer.
    """
    return np.abs(answer(nudged(images)).astype(np.float64) - answer(images))


def nudged(images: Images) -> Images:
    """The same images, rounded otherwise in their last bits."""
    return (images * np.float32(1 + 2**-22) + np.float32(1e-7)).astype(np.float32)


class _Asked:
    """Asks, and keeps the first thing that is wrong with the form of an answer."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._classes: int | None = None
        self.fault: str | None = None

    def __call__(self, images: Images) -> NDArray[np.float32]:
        count = len(images)
        nothing = np.zeros((count, self._classes or 1), np.float32)
        if self.fault is not None:
            return nothing
        try:
            logits = np.asarray(self._answer(np.ascontiguousarray(images)))
        except Exception as error:  # whatever a network raises
            lines = str(error).strip().splitlines()
            self.fault = f"does not run on {_images(count)}: {lines[0] if lines else type(error).__name__}"
            return nothing
        if logits.ndim != 2 or len(logits) != count or logits.shape[1] != (self._classes or logits.shape[1]):
            wanted = f"({count}, {self._classes or 'classes'})"
            self.fault = f"answers {_images(count)} with an array {logits.shape} instead of {wanted}"
            if count == 1 and logits.ndim == 1:
                self.fault += "; a squeeze() without an axis removes the batch axis as well"
            return nothing
        self._classes = logits.shape[1]
        return logits


def _differ(
    expected: NDArray[np.float32], found: NDArray[np.float32], noise: float | NDArray[np.float64] = 0.0
) -> float:
    """By how much, where it is more than rounding; else 0. Rows that are NaN in both are equal: black / its own maximum."""
    finite = expected[np.isfinite(expected).all(axis=1)]
    if len(finite) == 0:
        return 0.0
    limit = _ROUNDING * float(np.abs(finite).max()) + _SHARE * float(np.ptp(finite, axis=0).max()) + 1e-12
    off = np.abs(expected.astype(np.float64) - found)
    off = np.where(np.isnan(expected) & np.isnan(found), 0, np.nan_to_num(off, nan=np.inf))
    of_row = np.broadcast_to(np.nan_to_num(noise, nan=0.0), off.shape).max(axis=1)
    excess = off.max(axis=1) > limit + _CHAOS * of_row
    return float(off[excess].max()) if excess.any() else 0.0


def _images(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"
