"""A task of forty classes: the images of CIFAR-10, each turned by one of four angles, where class and angle together are to be told."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch.utils.data import TensorDataset

from training import data
from training.data import DataOptions, Split

ANGLES = 4


class Splits(NamedTuple):
    """What a data factory gives."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]


def cifar() -> Splits:
    """Each image once, at an angle of its own that is drawn with a fixed seed; found in $CIFAR10."""
    found = data.load(
        DataOptions(f"imagefolder:{os.environ.get('CIFAR10', 'cifar10')}", image_size=(32,), validation=0.02)
    )
    splits = [_turned(getattr(found, name), seed) for seed, name in enumerate(("train", "validation", "test"))]
    names = tuple(f"{name} {90 * angle}°" for name in found.classes for angle in range(ANGLES))
    return Splits(*splits, classes=names)


def _turned(split: Split, seed: int) -> TensorDataset:
    images, labels = (torch.from_numpy(one) for one in data.as_arrays(split))
    angles = torch.randint(ANGLES, labels.shape, generator=torch.Generator().manual_seed(seed))
    for angle in range(ANGLES):
        images[angles == angle] = images[angles == angle].rot90(angle, (2, 3))
    return TensorDataset(images, labels * ANGLES + angles)
