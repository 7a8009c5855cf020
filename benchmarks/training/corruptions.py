"""The common corruptions of Hendrycks and Dietterich (2019) on small grey images, as torch-uncertainty computes them.

13 of the 15 kinds, 5 severities, the first 1000 test images. Left out: defocus and motion blur, whose kernels are made for 224 pixels and as wide
as these images (up to 21 and 31 of 28 pixels). The images go in as three equal channels; the first one comes out, because the mean of three
channels' noises would be weaker by √3. Of frost, which is coloured, the mean.
Needs `pip install 'modepath[bench]'`.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from benchmarks.training.comparison import Labelled

IMAGES = 1000
SEVERITIES = (1, 2, 3, 4, 5)
LEFT_OUT = ("DefocusBlur", "MotionBlur")


def corrupted(test: Labelled) -> dict[str, Labelled]:
    """The test sets by KIND-SEVERITY; always the same ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        from torch_uncertainty.transforms.corruption import corruption_transforms

    images, labels = torch.from_numpy(test[0][:IMAGES]), test[1][:IMAGES]
    found: dict[str, Labelled] = {}
    for kind in corruption_transforms:
        if kind.__name__ in LEFT_OUT:
            continue
        for severity in SEVERITIES:
            torch.manual_seed(severity)
            np.random.seed(severity)
            try:
                corrupt = kind(severity, seed=severity)
            except TypeError:  # not all of them draw from a generator of their own
                corrupt = kind(severity)
            coloured = [corrupt(image.expand(3, -1, -1)) for image in images]
            out = [one.mean(0, keepdim=True) if kind.__name__ == "Frost" else one[:1] for one in coloured]
            found[f"{kind.__name__}-{severity}"] = torch.stack(out).clamp(0, 1).float().numpy(), labels
    return found
