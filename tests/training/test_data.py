import gzip
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from training import data, sources
from training.augment import Augment
from training.data import DataOptions, InMemory, Streamed, load
from training.errors import DataError

made = {}


def factory():
    return made["value"]


def own(value, **options):
    made["value"] = value
    return load(DataOptions(dataset="tests.training.test_data:factory", **options), lambda line: None)


def images(count, shape=(1, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, *shape, generator=generator), torch.arange(count) % 3)


def test_digits_are_split_without_overlap_and_repeatably():
    found = load(DataOptions(dataset="digits"), lambda line: None)
    assert (len(found.train), len(found.validation), len(found.test)) == (1293, 144, 360)
    assert found.shape == (1, 8, 8)
    assert found.augment.flip is False
    again = load(DataOptions(dataset="digits"), lambda line: None)
    assert found.fingerprint == again.fingerprint
    other = load(DataOptions(dataset="digits", split_seed=1), lambda line: None)
    assert other.fingerprint != found.fingerprint
    assert torch.equal(other.test.images, found.test.images)


def test_mean_and_std_are_those_of_the_train_split_and_said_aloud():
    said = []
    found = load(DataOptions(dataset="digits"), said.append)
    assert found.mean == pytest.approx([float(found.train.images.mean())], abs=1e-5)
    assert found.std == pytest.approx([float(found.train.images.std(correction=0))], abs=1e-5)
    assert "measured on 1293" in said[0]
    said.clear()
    assert load(DataOptions(dataset="digits", mean=(0.5,), std=(0.25,)), said.append).mean == (0.5,)
    assert said == []


def test_a_users_tuple_of_datasets_works():
    found = own((images(30), images(9, seed=1), images(12, seed=2)))
    assert (len(found.train), len(found.validation), len(found.test)) == (30, 9, 12)
    assert found.classes == ["0", "1", "2"]
    assert found.augment == Augment()


def test_a_users_object_says_more():
    value = SimpleNamespace(
        train=images(30), validation=None, test=images(12), classes=["a", "b", "c"], mean=[0.4], std=[0.2],
        augment=Augment(flip=True), resize="crop",
    )  # fmt: skip
    found = own(value, validation=0.2)
    assert (len(found.train), len(found.validation)) == (24, 6)
    assert (found.classes, found.mean, found.augment.flip, found.resize) == (["a", "b", "c"], (0.4,), True, "crop")


class Noisy(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.rand(1, 4, 4), index % 2


def test_a_dataset_that_is_random_by_itself_is_not_frozen_in_memory():
    value = SimpleNamespace(train=Noisy(), validation=images(6), test=images(6), classes=["a", "b", "c"])
    found = own(value)
    assert isinstance(found.train, Streamed)
    assert isinstance(found.test, InMemory)
    first, second = (next(found.train.batches(torch.arange(4), 4))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_streamed_and_held_data_are_the_same_images():
    held = own((images(30), images(9), images(12)), in_memory="yes")
    value = SimpleNamespace(train=images(30), validation=images(9), test=images(12), classes=["0", "1", "2"])
    streamed = own(value, in_memory="no", workers=1)
    order = torch.randperm(30)
    for (a, b), (c, d) in zip(held.train.batches(order, 8), streamed.train.batches(order, 8), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert torch.equal(
        streamed.train.take(order[:3]).take(torch.tensor([2])).dataset[0][0], held.train.images[order[2]]
    )


def scaled(factor):
    return TensorDataset(torch.rand(6, 1, 4, 4) * factor, torch.arange(6) % 2)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ((images(6), images(6)), "must return"),
        (7, "must return"),
        ((scaled(255), images(6), images(6)), r"lie in \[0, 1\]"),
        ((TensorDataset(torch.zeros(6, 4, 4), torch.zeros(6)), images(6), images(6)), r"\(C, H, W\)"),
        ((TensorDataset(torch.rand(6, 1, 4, 4), torch.rand(6)), images(6), images(6)), "integers"),
        ((images(6), images(6), images(6, shape=(1, 5, 5))), "different shapes"),
        ((TensorDataset(torch.zeros(0, 1, 4, 4), torch.zeros(0)), images(6), images(6)), "empty"),
        ((SimpleNamespace(__len__=lambda: 3), images(6), images(6)), "cannot be read"),
    ],
)
def test_malformed_data_is_told(value, told):
    with pytest.raises(DataError, match=told):
        own(value)


def test_labels_beyond_the_classes_are_told():
    value = SimpleNamespace(train=images(6), validation=images(6), test=images(6), classes=["a", "b"])
    with pytest.raises(DataError, match="labels 0 … 2 but 2 classes"):
        own(value)


@pytest.mark.parametrize("name", ["mnist", "", "cifar10", "cifar100", "imagefolder:nowhere"])
def test_unknown_and_absent_data_sets_are_told(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEPATH_DATA", str(tmp_path))
    with pytest.raises(DataError):
        load(DataOptions(dataset=name))


def test_idx_files_are_read_gzipped_or_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEPATH_DATA", str(tmp_path))
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(20 * 28 * 28, dtype=np.uint8).reshape(20, 28, 28)
    labels = (np.arange(20) % 10).astype(np.uint8)
    for prefix in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (20, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        content = bytes([0, 0, 8, 1]) + (20).to_bytes(4, "big") + labels.tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    found = load(DataOptions(dataset="fashion-mnist"), lambda line: None)
    assert len(found.train) + len(found.validation) == 20
    batch, truth = next(found.test.batches(torch.arange(20), 20))
    assert torch.equal(batch[:, 0], torch.from_numpy(pixels).float() / 255)
    assert truth.tolist() == labels.tolist()
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="not a whole idx file"):
        load(DataOptions(dataset="fashion-mnist"))


def test_real_fashion_mnist():
    if not sources.DEBIAN_FASHION.exists():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    found = load(DataOptions(dataset="fashion-mnist"), lambda line: None)
    assert (len(found.train), len(found.validation), len(found.test)) == (54_000, 6_000, 10_000)
    assert found.mean == pytest.approx([0.286], abs=0.002)
    assert torch.bincount(found.test.labels).tolist() == [1000] * 10


@pytest.mark.parametrize("splits", [(), ("train", "val"), ("train", "val", "test")])
def test_image_folders_are_read_with_and_without_splits(tmp_path, splits):
    for split in splits or ("",):
        for label, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(10):
                Image.new("RGB", (20, 30), colour).save(folder / f"{index}.png")
    found = load(DataOptions(dataset=f"imagefolder:{tmp_path}", image_size=16), lambda line: None)
    assert (found.shape, found.classes, found.resize) == ((3, 16, 16), ["blue", "red"], "crop")
    expected = {0: (14, 2, 4), 2: (18, 2, 20), 3: (20, 20, 20)}[len(splits)]
    assert (len(found.train), len(found.validation), len(found.test)) == expected
    batch, truth = next(found.test.batches(data.in_order(found.test), 64))
    assert torch.equal(batch[:, 0].mean(dim=(1, 2)), truth.float())  # red is class 1
