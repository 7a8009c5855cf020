import numpy as np
import pytest
import torch

from training.data.contract import Contract
from training.data.forms import FeatureForm, TokenForm
from training.errors import DataError

ROWS, TEXTS = Contract("The train split of 'mine'", form=FeatureForm()), TokenForm(9)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8, bool])
def test_features_of_any_type_become_float32(dtype):
    x = np.arange(12).reshape(4, 3).astype(dtype)
    found, labels = ROWS.arrays(x, np.arange(4) % 2)
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(x.astype(np.float32))
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.array([[1.0, np.nan], [0, 0]]), r"row 0, has a value that is NaN .*--missing mean"),
        (np.array([[1.0, 0], [np.inf, 0]]), "row 1, has a value that is infinite"),
        (np.zeros((2, 0)), "with a number at least"),
        (np.zeros(2), r"must be \(N, …\)"),
        (np.array([["a"], ["b"]]), "cannot become a tensor"),
    ],
)
def test_features_that_are_no_numbers_are_refused_with_their_row(x, told):
    with pytest.raises(DataError, match=told):
        ROWS.arrays(x, np.arange(len(x)))


def test_rows_of_a_data_set_are_read_one_by_one():
    found, labels = ROWS.read([(np.ones(3), 0), ([0.5, 1, 2], 1)], [0, 1])
    assert found.tolist() == [[1, 1, 1], [0.5, 1, 2]]
    assert labels.tolist() == [0, 1]


def test_texts_of_several_lengths_are_filled_up():
    found = TEXTS.whole([[1, 2], [3, 4, 5], [6]], "Texts")
    assert found.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    known = TEXTS.of_length(3)
    assert known.one([7], "Row").tolist() == [7, 0, 0]
    assert known.whole(torch.tensor([[1, 2, 3, 0]]), "Texts").tolist() == [[1, 2, 3]]
    with pytest.raises(DataError, match="more than 3 tokens"):
        known.whole(torch.tensor([[1, 2, 3, 4]]), "Texts")


@pytest.mark.parametrize(
    ("x", "told"),
    [
        ([[1.5, 2.0]], "a text is integers"),
        (torch.zeros(3, 2), r"integers \(N, length\)"),
        (torch.tensor([[1, 9]]), "they go from 1 to 8"),
        (torch.tensor([[0, 1]]), "before a token"),
        (torch.tensor([[1], [0]]), "without tokens"),
    ],
)
def test_what_are_no_token_ids_is_refused(x, told):
    contract = Contract("Texts", form=TEXTS)
    with pytest.raises(DataError, match=told):
        contract.arrays(x, np.zeros(len(x), int))
