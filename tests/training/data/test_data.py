import gzip
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from training import data
from training.data import DataOptions, InMemory, Streamed, load, sources
from training.data.augment import Augment
from training.errors import DataError

made = {}


def factory():
    return made["value"]


def own(value, **options):
    made["value"] = value
    return load(DataOptions(dataset="tests.training.data.test_data:factory", **options))


def images(count, shape=(1, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, *shape, generator=generator), torch.arange(count) % 3)


def test_digits_are_split_without_overlap_and_repeatably():
    found = load(DataOptions(dataset="digits"))
    assert (len(found.train), len(found.validation), len(found.test)) == (1293, 144, 360)
    assert found.shape == (1, 8, 8)
    assert found.augment.flip is False
    again = load(DataOptions(dataset="digits"))
    assert found.fingerprint == again.fingerprint
    other = load(DataOptions(dataset="digits", split_seed=1))
    assert other.fingerprint != found.fingerprint
    assert torch.equal(other.test.images, found.test.images)


def test_mean_and_std_are_those_of_the_train_split_and_said_aloud():
    found = load(DataOptions(dataset="digits"))
    assert found.mean == pytest.approx([float(found.train.images.mean())], abs=1e-5)
    assert found.std == pytest.approx([float(found.train.images.std(correction=0))], abs=1e-5)
    assert "measured on 1293" in found.notes[0]
    given = load(DataOptions(dataset="digits", mean=(0.5,), std=(0.25,)))
    assert (given.mean, given.notes) == ((0.5,), ())


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
    assert (found.classes, found.mean, found.augment.flip, found.input.resize) == (
        ["a", "b", "c"],
        (0.4,),
        True,
        "crop",
    )


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


def pair(count, scale=1.0, classes=3):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(count)) * scale, torch.arange(
        count
    ) % classes


def with_row(dataset, row, image=None, label=None):
    """The items of a data set, with the image or label of one row replaced."""
    items = [(image, int(label)) for image, label in dataset]
    items[row] = (items[row][0] if image is None else image, items[row][1] if label is None else label)
    return items


FORMS = {
    "tensors": lambda dataset: (torch.stack([i for i, _ in dataset]), torch.tensor([k for _, k in dataset])),
    "arrays": lambda dataset: (np.stack([i.numpy() for i, _ in dataset]), np.array([k for _, k in dataset])),
    "data set": lambda dataset: dataset,
    "streamed": lambda dataset: dataset,
}


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.rand(1, 4, 4), 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"image": torch.full((1, 4, 4), 255.0)}, r"row 25; they must lie in \[0, 1\]"),
        ({"image": torch.full((1, 4, 4), torch.nan)}, "row 25, has NaN"),
        ({"label": 3}, "row 25|3 in the .* split"),
        ({"label": -1}, "row 25|-1 in the .* split"),
    ],
)
def test_one_wrong_row_is_refused_in_every_form_and_split(form, split, fault, cause):
    parts = {name: FORMS[form](images(30)) for name in ("train", "validation", "test")}
    parts[split] = FORMS[form](with_row(images(30), 25, **fault))
    value = SimpleNamespace(**parts, classes=["a", "b", "c"], mean=[0.5], std=[0.5])
    with pytest.raises(DataError, match=cause) as caught:
        found = own(value, in_memory="no" if form == "streamed" else "auto")
        bad = getattr(found, split)
        list(bad.batches(data.in_order(bad), 8))
    assert split in str(caught.value)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (((pair(30)[0], pair(20)[1]), pair(9), pair(9)), "train split .* 30 images and 20 labels"),
        ((pair(30), pair(9), pair(9, scale=255)), "test split .* divide by 255"),
        ((pair(30), pair(9), (*pair(9), 0)), "test split .* has 3 parts"),
        (((torch.rand(30, 8, 8, 3), pair(30)[1]), pair(9), pair(9)), r"looks like \(H, W, C\)"),
        (((pair(30)[0], pair(30)[1] * 100), pair(9), pair(9)), "3 different labels between 0 and 200|never in the train"),
        (((pair(30)[0], pair(30)[1] + 1), (pair(9)[0], pair(9)[1] + 1), (pair(9)[0], pair(9)[1] + 1)), "from 1 to 3"),
        ((pair(30), pair(9), pair(9, classes=4)), "label 3 occurs in the test split but never in the train split"),
        ((Endless(), images(6), images(6)), "IterableDataset"),
        ((DataLoader(images(6), sampler=WeightedRandomSampler([1.0] * 6, 6)), images(6), images(6)), "sampler or collate_fn"),
        (SimpleNamespace(train=pair(30), validation=None, test=pair(9), classes=["a", "b", "a"]), "several classes of the name 'a'"),
        (SimpleNamespace(train=pair(30), validation=None, test=pair(9), classes=3), "classes must be a list of names"),
        (SimpleNamespace(train=pair(30), validation=None, test=pair(9), mean=0.5), "mean must be a list of numbers"),
    ],
)  # fmt: skip
def test_splits_that_break_the_contract_are_refused_with_the_cause(value, cause):
    with pytest.raises(DataError, match=cause):
        own(value)


def test_arrays_data_loaders_and_other_types_are_the_same_data_as_tensors():
    splits = pair(30), pair(9), pair(12)
    expected = own(splits)
    forms = [
        tuple((x.double().numpy(), k.numpy().astype(np.int32)) for x, k in splits),
        tuple((x.clone().requires_grad_(), k.float()) for x, k in splits),
        tuple(DataLoader(TensorDataset(*part), batch_size=4, shuffle=True) for part in splits),
        dict(zip(("train", "validation", "test"), splits, strict=True)),
    ]
    for form in forms:
        found = own(form)
        assert found.fingerprint == expected.fingerprint
        assert (found.mean, found.std, found.classes) == (expected.mean, expected.std, expected.classes)


class Listed(Dataset):
    """A data set too large for memory, with a list of labels."""

    def __init__(self, labels):
        self.targets = labels

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        return torch.full((1, 4, 4), row / len(self)), self.targets[row]


def test_a_streamed_data_set_that_lists_its_labels_needs_no_class_names():
    found = own((Listed([0, 1, 2] * 20), Listed([0, 1, 2]), Listed([0, 2])), in_memory="no")
    assert isinstance(found.train, Streamed)
    assert found.classes == ["0", "1", "2"]
    with pytest.raises(DataError, match="from 1 to 3"):
        own((Listed([1, 2, 3] * 20), Listed([1, 2]), Listed([3])), in_memory="no")


def test_a_class_without_training_images_is_reported_where_classes_are_named():
    value = SimpleNamespace(train=pair(30, classes=2), validation=None, test=pair(9), classes=["a", "b", "c"])
    made["value"] = value
    found = load(DataOptions(dataset="tests.training.data.test_data:factory"))
    assert found.classes == ["a", "b", "c"]
    assert any("no training image of 1 of 3 classes: c" in line for line in found.warnings)


def fixed(count, kind=torch.float32):
    values = torch.arange(count * 16).reshape(count, 1, 4, 4) % 256
    return (values.to(kind) if kind == torch.uint8 else values.float() / 255), torch.arange(count) % 3


def test_fingerprints_of_data_stay_what_they_were():
    """Runs are looked up by these fingerprints, which are those of the first release."""
    assert load(DataOptions(dataset="digits")).fingerprint.startswith("c2de9bf95a5b7788")
    sets = [TensorDataset(*fixed(count)) for count in (30, 9, 12)]
    named = SimpleNamespace(train=sets[0], validation=sets[1], test=sets[2], classes=["a", "b", "c"])
    cut = SimpleNamespace(train=TensorDataset(*fixed(100)), validation=None, test=sets[2], classes=["a", "b", "c"])
    assert own((fixed(30), fixed(9), fixed(12))).fingerprint.startswith("2352086dbaf72a56")
    assert own((fixed(30, torch.uint8), None, fixed(12))).fingerprint.startswith("06901423743ca773")
    assert own(tuple(sets)).fingerprint.startswith("2352086dbaf72a56")
    assert own(named, in_memory="no").fingerprint.startswith("893396658e45484f")
    assert own(cut, in_memory="no", limit=50).fingerprint.startswith("78f58459078c4664")


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
    found = load(DataOptions(dataset="fashion-mnist"))
    assert len(found.train) + len(found.validation) == 20
    batch, truth = next(found.test.batches(torch.arange(20), 20))
    assert torch.equal(batch[:, 0], torch.from_numpy(pixels).float() / 255)
    assert truth.tolist() == labels.tolist()
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="not a complete idx file"):
        load(DataOptions(dataset="fashion-mnist"))


def test_real_fashion_mnist():
    if not sources.DEBIAN_FASHION.exists():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    found = load(DataOptions(dataset="fashion-mnist"))
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
    found = load(DataOptions(dataset=f"imagefolder:{tmp_path}", image_size=16))
    assert (found.shape, found.classes, found.input.resize) == ((3, 16, 16), ["blue", "red"], "crop")
    expected = {0: (14, 2, 4), 2: (18, 2, 20), 3: (20, 20, 20)}[len(splits)]
    assert (len(found.train), len(found.validation), len(found.test)) == expected
    batch, truth = next(found.test.batches(data.in_order(found.test), 64))
    assert torch.equal(batch[:, 0].mean(dim=(1, 2)), truth.float())  # red is class 1
