import pytest

pytest.importorskip("torch", reason="the training extra is not installed")

import torch

from models_store.manifest import InputSpec
from training import command, logger
from training.data import Data, InMemory
from training.data.augment import Augment

# Shown as a command shows it: under pytest the root logger has handlers, which would take its place.
logger.propagate = False
command.show_log()

SMALL = {"network": "preresnet8", "network_options": ("width=0.25",), "batch_size": 64, "limit": 640}


def make_data(count=64, shape=(1, 6, 6), classes=3, seed=0):
    """Small random splits. The label is the brightest third of the image, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)

    def split(rows):
        images = torch.rand(rows, *shape, generator=generator)
        bands = images.mean(dim=1).flatten(1).chunk(classes, dim=1)
        return InMemory(images, torch.stack([b.mean(dim=1) for b in bands], dim=1).argmax(dim=1))

    return Data(
        train=split(count), validation=split(count), test=split(count), classes=[str(c) for c in range(classes)], input=InputSpec(shape=shape),
        mean=(0.5,) * shape[0], std=(0.3,) * shape[0], augment=Augment(), fingerprint="test",
    )  # fmt: skip


@pytest.fixture
def data():
    return make_data()


@pytest.fixture(scope="session")
def curve_version(tmp_path_factory):
    """A small published curve of three members, at t = 0, ½ and 1, in a separate store."""
    from training import curve

    folder = tmp_path_factory.mktemp("path")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELS_STORE", str(folder / "store"))
        patch.setenv("MODEPATH_RUNS", str(folder / "runs"))
        return curve.run(curve.Config(name="c", epochs=6, bank=0, members=3, **SMALL))


@pytest.fixture
def here(curve_version, monkeypatch, tmp_path):
    """The published curve, with $MODELS_STORE set to its store."""
    monkeypatch.setenv("MODELS_STORE", str(curve_version.folder.parent.parent))
    monkeypatch.chdir(tmp_path)
    return curve_version
