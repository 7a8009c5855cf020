"""Images that are drawn by a program, which no classifier was trained on: far foreign sets for `training.evaluate`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models_store.inputs import kinds
from models_store.inputs.kinds import Inputs
from models_store.manifest import InputSpec
from training.errors import DataError

IMAGES = 2000
GRATINGS = 4  # that are added up to a texture


def noise(shape: tuple[int, int, int], images: int = IMAGES) -> NDArray[np.float32]:
    """Independent uniform values, (images, C, H, W) in [0, 1]; always the same ones."""
    return np.random.default_rng(0).random((images, *shape), np.float32)


def textures(shape: tuple[int, int, int], images: int = IMAGES) -> NDArray[np.float32]:
    """Sums of sinusoidal gratings of random direction, period and colour, (images, C, H, W) in [0, 1]; always the same ones."""
    channels, height, width = shape
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    out = np.empty((images, *shape), np.float32)
    for image in out:
        angle = rng.uniform(0, np.pi, GRATINGS)
        period = np.exp(rng.uniform(np.log(3), np.log(max(height, width)), GRATINGS))
        phase = rng.uniform(0, 2 * np.pi, GRATINGS)
        colour = rng.normal(size=(channels, GRATINGS))
        along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
        waves = np.sin(2 * np.pi * along / period[:, None, None] + phase[:, None, None])
        total = np.tensordot(colour, waves, axes=1)
        image[:] = (total - total.min()) / (np.ptp(total) or 1)
    return out


SETS = {"noise": noise, "textures": textures}


def rows(name: str, spec: InputSpec) -> Inputs:
    """A set of SETS for an ensemble, (IMAGES, *shape).

    Raises:
        DataError: textures for anything but images.
    """
    if spec.kind != "image":
        if name != "noise":
            raise DataError(f"The foreign set {name} is drawn for images; the ensemble takes {spec.kind}. Use noise.")
        return kinds.arranged(spec, kinds.noise(spec, IMAGES))
    channels, height, width = spec.shape
    return SETS[name]((channels, height, width))
