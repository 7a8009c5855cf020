"""The common corruptions of Hendrycks and Dietterich (2019), as torch-uncertainty computes them, at 5 severities.

On images of less than 64 pixels, 13 of the 15 kinds: defocus and motion blur are left out, because their kernels are made for
224 pixels (up to 21 and 31 pixels wide). Grey images go in as three equal channels; the first one comes out, because the
mean of three channels' noises would be weaker by √3. Of frost, which is coloured, the mean.
Needs `pip install 'modepath[bench]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.errors import ConfigError

SEVERITIES = (1, 2, 3, 4, 5)
LEFT_OUT = ("DefocusBlur", "MotionBlur")
SMALL = 64


def corrupted(
    images: NDArray[np.float32], severities: Sequence[int] = SEVERITIES
) -> Iterator[tuple[str, int, NDArray[np.float32]]]:
    """Kind, severity and corrupted images for each kind and severity; always the same ones.

    Args:
        images: (images, C, H, W) in [0, 1], with one or three channels.
        severities: which of the severities 1 to 5.

    Raises:
        ConfigError: torch-uncertainty is not installed, or the images have another number of channels.
    """
    given = torch.from_numpy(images)
    channels = given.shape[1]
    if channels not in (1, 3):
        raise ConfigError(f"The corruptions are defined for grey and colour images; these have {channels} channels.")
    for kind in _kinds():
        if kind.__name__ in LEFT_OUT and max(given.shape[2:]) < SMALL:
            continue
        for severity in severities:
            torch.manual_seed(severity)
            np.random.seed(severity)
            try:
                corrupt = kind(severity, seed=severity)
            except TypeError:  # not all of them draw from a generator of their own
                corrupt = kind(severity)
            out = torch.stack([corrupt(image.expand(3, -1, -1)) for image in given])
            if channels == 1:
                out = out.mean(1, keepdim=True) if kind.__name__ == "Frost" else out[:, :1]
            yield kind.__name__, severity, out.clamp(0, 1).float().numpy()


def _kinds() -> Sequence[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        try:
            from torch_uncertainty.transforms.corruption import (  # pyright: ignore[reportMissingImports]
                corruption_transforms,  # pyright: ignore[reportUnknownVariableType]
            )
        except ImportError:
            raise ConfigError(
                "--corruptions needs torch-uncertainty, which computes them: pip install 'modepath[bench]'."
            ) from None
    return corruption_transforms  # pyright: ignore[reportUnknownVariableType]
