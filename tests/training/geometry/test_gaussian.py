import numpy as np
import pytest
import torch
from scipy import stats

from training.geometry.gaussian import Gaussian

NAMES = [["weight", "tied"], ["other"]]


def states(count, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        weight = torch.tensor(100 + scale * rng.normal(size=(3, 2)), dtype=torch.float32)
        other = torch.tensor(scale * rng.normal(size=2), dtype=torch.float32)
        found.append({"weight": weight, "tied": weight, "other": other, "moving": torch.full((2,), float(number))})
    return found


def flat(state):
    return np.concatenate([state[name].double().numpy().ravel() for name in ("weight", "other")])


def stacked(found):
    return np.stack([flat(state) for state in found])


def test_mean_and_variance_are_those_of_all_weight_sets_even_far_from_zero():
    passed = states(40, scale=1e-3)
    gaussian = Gaussian(passed, NAMES, rank=5)
    assert flat(gaussian.mean) == pytest.approx(stacked(passed).mean(axis=0), abs=2e-5)
    # Near 100, float32 resolves 8e-6; a difference of two squares would lose a variance of 1e-6 completely.
    assert flat(gaussian.variance) == pytest.approx(stacked(passed).var(axis=0), rel=2e-2)


def test_the_low_rank_part_holds_the_last_deviations_from_the_running_mean():
    passed = states(9)
    gaussian = Gaussian(passed, NAMES, rank=4)
    all_of_them = stacked(passed)
    expected = [all_of_them[t] - all_of_them[: t + 1].mean(axis=0) for t in range(5, 9)]
    assert stacked(gaussian.deviations) == pytest.approx(np.stack(expected), abs=2e-5)


def test_samples_have_half_the_diagonal_and_half_the_low_rank_covariance():
    """Checked over all parameters together: a separate z₂ per parameter would remove the covariance between them."""
    passed = states(12)
    gaussian = Gaussian(passed, NAMES, rank=3)
    drawn = stacked([gaussian.sample(torch.Generator().manual_seed(seed)) for seed in range(6000)])
    columns = stacked(gaussian.deviations).T
    expected = 0.5 * np.diag(stacked(passed).var(axis=0)) + 0.5 * columns @ columns.T / (3 - 1)
    assert np.abs(expected[:6, 6:]).max() > 0.2  # between the parameters
    assert np.abs(np.cov(drawn.T) - expected).max() < 0.08 * np.diag(expected).max()
    for axis, values in enumerate(drawn.T):
        normal = stats.norm(stacked(passed)[:, axis].mean(), np.sqrt(expected[axis, axis]))
        assert stats.kstest(values, normal.cdf).pvalue > 1e-3


def test_a_tied_weight_is_one_weight_and_what_is_no_parameter_is_that_of_the_last_weight_set():
    gaussian = Gaussian(states(4), NAMES, rank=2)
    drawn = gaussian.sample(torch.Generator().manual_seed(0))
    assert torch.equal(drawn["tied"], drawn["weight"])
    assert drawn["moving"].tolist() == [3, 3]
    assert drawn["weight"].dtype == torch.float32


@pytest.mark.parametrize(("count", "rank"), [(1, 5), (5, 1)])
def test_too_little_for_a_gaussian_is_told(count, rank):
    with pytest.raises(ValueError, match="two weight sets and rank 2"):
        Gaussian(states(count), NAMES, rank)
