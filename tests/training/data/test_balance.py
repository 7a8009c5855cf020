import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from training.data import balance
from training.errors import ConfigError, DataError

LABELS = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
NAMES = ["a", "b", "c"]


def test_balanced_weights_are_those_of_scikit_learn():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy())
    found = balance.class_weights(("balanced",), LABELS, NAMES)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_given_weights_keep_their_ratios_and_have_mean_1_over_the_rows():
    found = balance.class_weights(("1", "2", "4"), LABELS, NAMES)
    np.testing.assert_allclose((found / found[0]).numpy(), [1, 2, 4], rtol=1e-6)
    assert float(found[LABELS].mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("given", [("1", "2"), ("1", "x", "2"), ("1", "-1", "2"), ("0", "0", "0"), ("nan", "1", "1")])
def test_other_weights_are_refused(given):
    with pytest.raises(ConfigError, match="--class-weights"):
        balance.class_weights(given, LABELS, NAMES)


def test_unknown_labels_are_named():
    with pytest.raises(DataError, match="labels of all training rows"):
        balance.class_weights(("balanced",), None, NAMES)


def test_balanced_rows_have_each_class_equally_often():
    rows = balance.drawn(balance.row_weights(LABELS, 3), 30_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(LABELS[rows], minlength=3) / 30_000
    np.testing.assert_allclose(shares.numpy(), [1 / 3] * 3, atol=0.015)  # 5 standard errors


def test_rows_are_drawn_by_their_weights_and_never_with_weight_0():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    rows = balance.drawn(weights, 40_000, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(torch.bincount(rows, minlength=4).numpy() / 40_000, [0, 0.25, 0.75, 0], atol=0.012)
