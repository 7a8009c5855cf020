import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from training.data.classes import known_labels, settle, without_images
from training.data.contract import Contract
from training.errors import DataError


def settled(train, test=(0,), names=None):
    return settle("pets", names, {"train": torch.tensor(train), "test": torch.tensor(test)})


def test_without_names_classes_are_numbered():
    assert settled([1, 0, 2, 2]) == ["0", "1", "2"]


def test_names_may_stand_for_classes_without_images():
    assert settled([1, 0], names=["a", "b", "c"]) == ["a", "b", "c"]
    assert without_images(["a", "b", "c"], torch.tensor([2, 0])) == ["b"]


@pytest.mark.parametrize(
    ("train", "test", "names", "cause"),
    [
        ([0, 100, 200], [0], None, "3 different labels between 0 and 200: the train split has no image of 1, 2, 3, 4, 5 and 193 more.*Map"),
        ([0, 10**12], [0], None, "2 different labels"),
        ([1, 2, 3], [2], None, "labels from 1 to 3; labels count from 0. Subtract 1"),
        ([0, 1], [0, 2], None, "label 2 occurs in the test split but never in the train split"),
        ([2, 3], [2], None, "the train split has no image of 0, 1"),
        ([0, -1], [0], None, "labels -1 … 0. A negative label"),
        ([0, 0], [0], None, "1 class; a classifier needs at least 2"),
        ([1, 2], [1], ["a", "b"], "labels 1 … 2 but 2 classes: 2 in the train split, row 1. Labels seem to begin at 1"),
        ([0, 1], [0, 1, 5], ["a", "b"], "5 in the test split, row 2"),
        ([0, -1], [0], ["a", "b"], "-1 in the train split, row 1. A negative label"),
        ([0, 1], [0], ["a", "b", "a"], "several classes of the name 'a'"),
        ([0, 0], [0], ["a"], "1 class; a classifier needs at least 2"),
        ([0, 1], [0], ["a", "\udc80"], "not valid Unicode"),
    ],
)  # fmt: skip
def test_labels_and_names_that_do_not_fit_are_refused_with_the_cause(train, test, names, cause):
    with pytest.raises(DataError, match=cause):
        settled(train, test, names)


def test_labels_that_are_not_known_need_names():
    with pytest.raises(DataError, match="must name its classes"):
        settle("pets", None, {"train": None, "test": torch.tensor([0, 1])})
    assert settle("pets", ["a", "b"], {"train": None, "test": torch.tensor([0, 1])}) == ["a", "b"]


class Counting(Dataset):
    """Counts reads; `answer` maps a stored label to the one that is returned."""

    def __init__(self, labels, attribute="targets", answer=int):
        setattr(self, attribute, labels)
        self.truth, self.answer, self.read = [int(label) for label in labels], answer, 0

    def __len__(self):
        return len(self.truth)

    def __getitem__(self, row):
        self.read += 1
        return torch.rand(1, 4, 4), self.answer(self.truth[row])


LABELS = list(range(50)) * 4


@pytest.mark.parametrize("attribute", ["targets", "labels"])
@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_labels_that_a_data_set_lists_are_known_after_few_reads(attribute, form):
    dataset = Counting(form(LABELS), attribute)
    assert known_labels(dataset, Contract("")).tolist() == LABELS
    assert dataset.read < 20
    assert known_labels(Subset(dataset, [7, 3]), Contract("")).tolist() == [7, 3]
    assert known_labels(Subset(Subset(dataset, [7, 3]), [1]), Contract("")).tolist() == [3]


def test_labels_of_a_tensor_data_set_are_known():
    assert known_labels(TensorDataset(torch.rand(3, 1, 4, 4), torch.tensor([2, 0, 1])), Contract("")).tolist() == [
        2,
        0,
        1,
    ]


@pytest.mark.parametrize(
    "dataset",
    [
        Counting(LABELS, answer=lambda label: label // 2),
        Counting(LABELS, answer=lambda label: min(label, 48)),
        Counting(LABELS, attribute="other"),
        Subset(Counting(LABELS, attribute="other"), [0]),
        Counting(np.array([0.25, 0.75])),
    ],
)
def test_lists_that_are_not_the_labels_are_not_believed(dataset):
    assert known_labels(dataset, Contract("")) is None
