"""Check that a network's output for an image does not depend on the rest of the batch.

A server puts the images of several clients into one batch. So the output for an image must not depend on the other
images, on their order or on how many there are. Training checks a network before its first epoch and each member
at publication; the import of foreign models checks each file. All of them use this module.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models_store.inputs import kinds
from models_store.inputs.kinds import Inputs
from models_store.manifest import InputSpec

Images = Inputs  # or any other input
Answer = Callable[[Images], NDArray[np.float32]]  # (batch, *shape) -> (batch, classes)

# Tolerances. Another batch size may select another kernel, which rounds its sums differently. One tolerance is relative
# to the differences between images, because the logits of an untrained network may be nearly equal for all images.
_ROUNDING = 1e-4  # relative to the largest |logit|
_SHARE = 1e-3  # relative to the range of a logit over the images
_CHAOS = 10.0  # relative to the effect of rounding the image itself; see `rounding`


def fault(answer: Answer, images: Images, spec: InputSpec | None = None) -> str | None:
    """Compare a network's outputs for the images together, alone, in another order, in pairs and in a larger batch.

    Args:
        answer: the network; an exception that it raises counts as a fault.
        images: at least three rows, such as those of kinds.probes.
        spec: the input, if it is not an image. Texts of open length are then asked about alone without their padding.

    Returns:
        The fault, worded to follow the network's name in a sentence; None if each output depends on its own image only.
    """
    asked = _Asked(answer)
    count = len(images)
    together = asked(images)
    moved = asked(kinds.nudged(images))
    again = asked(images)
    reversed_order = asked(images[::-1])
    alone = [asked(images[i : i + 1] if spec is None else kinds.alone(spec, images[i : i + 1])) for i in range(count)]
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
    """How far the outputs move when the images are rounded differently, (batch, classes).

    An untrained deep network can amplify the last bit of an image, or of any intermediate result, to its whole output.
    """
    return np.abs(answer(kinds.nudged(images)).astype(np.float64) - answer(images))


class _Asked:
    """Calls the network and records the first fault in the form of an output."""

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
    """Largest difference beyond rounding, or 0. NaN in both is equal, as for a black image divided by its maximum."""
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
