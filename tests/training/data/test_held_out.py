"""Held-out classes are in no split, and the others keep their images."""

from types import SimpleNamespace

import pytest
import torch

from training import data
from training.data import DataOptions, Streamed, load
from training.errors import DataError

NAMES = ["cat", "dog", "bird", "fish"]
labels = torch.arange(40) % 4
images = torch.rand(40, 1, 4, 4)


def factory():
    return SimpleNamespace(train=(images, labels), validation=(images, labels), test=(images, labels), classes=NAMES)


class Photos(torch.utils.data.Dataset):
    targets = labels.tolist()

    def __len__(self):
        return 40

    def __getitem__(self, row):
        return images[row], int(labels[row])


def streamed():
    return SimpleNamespace(train=Photos(), validation=Photos(), test=Photos(), classes=NAMES)


@pytest.mark.parametrize("source", ["factory", "streamed"])
def test_the_other_classes_keep_their_images_under_new_numbers(source):
    options = DataOptions(dataset=f"{__name__}:{source}", hold_out=("dog",), in_memory="no")
    found = load(options)
    assert isinstance(found.train, Streamed) == (source == "streamed")
    assert found.classes == ["cat", "bird", "fish"]
    for split in (found.train, found.validation, found.test):
        kept, numbers = data.as_arrays(split)
        assert torch.equal(torch.from_numpy(kept), images[labels != 1])
        assert [found.classes[number] for number in numbers] == [NAMES[label] for label in labels if label != 1]
        assert split.labels is not None
        assert split.labels.tolist() == numbers.tolist()
    assert torch.equal(torch.from_numpy(data.foreign(options)[0]), images[labels == 1])


@pytest.mark.parametrize(
    ("held", "message"),
    [(("horse",), "no class horse. Its classes: cat, dog"), (("cat", "dog", "bird"), "leaves 1 class")],
)
def test_classes_that_cannot_be_held_out_are_refused(held, message):
    with pytest.raises(DataError, match=message):
        load(DataOptions(dataset=f"{__name__}:factory", hold_out=held))


def test_without_known_labels_a_streamed_data_set_cannot_hold_out_classes():
    hidden = type("Hidden", (Photos,), {"targets": None})
    globals()["unknown"] = lambda: SimpleNamespace(train=hidden(), validation=hidden(), test=hidden(), classes=NAMES)
    with pytest.raises(DataError, match="labels are unknown before"):
        load(DataOptions(dataset=f"{__name__}:unknown", hold_out=("dog",), in_memory="no"))
