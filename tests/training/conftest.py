import pytest

pytest.importorskip("torch", reason="the training extra is not installed")

import torch

from training.augment import Augment
from training.data import Data, InMemory


def make_data(count=64, shape=(1, 6, 6), classes=3, seed=0):
    """Small random splits whose label is the brightest third of the image, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)

    def split(rows):
        images = torch.rand(rows, *shape, generator=generator)
        bands = images.mean(dim=1).flatten(1).chunk(classes, dim=1)
        return InMemory(images, torch.stack([b.mean(dim=1) for b in bands], dim=1).argmax(dim=1))

    return Data(
        train=split(count), validation=split(count), test=split(count), classes=[str(c) for c in range(classes)], shape=shape,
        mean=(0.5,) * shape[0], std=(0.3,) * shape[0], augment=Augment(), resize="refuse", fingerprint="test",
    )  # fmt: skip


@pytest.fixture
def data():
    return make_data()
