import math

import numpy as np
import pytest
from scipy.spatial import ConvexHull

from training.geometry import volume


def regular(k):
    """k + 1 points with pairwise distance √2, in k + 1 dimensions."""
    return np.eye(k + 1)


def log_volume_of_regular(k, edge):
    return k * math.log(edge) + 0.5 * math.log((k + 1) / 2**k) - math.lgamma(k + 1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("k", range(13))
def test_regular_simplexes_have_their_closed_form(k, scale):
    found = volume.log_volume(scale * regular(k))
    assert found == pytest.approx(log_volume_of_regular(k, scale * math.sqrt(2)), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_segment_and_a_triangle(scale):
    segment = scale * np.array([[1.0, 2.0, 2.0], [0, 0, 0]])
    assert volume.log_volume(segment) == pytest.approx(math.log(3 * scale), abs=1e-9)
    triangle = scale * np.array([[0.0, 0], [3, 0], [7, 4]])
    assert volume.log_volume(triangle) == pytest.approx(math.log(6 * scale**2), abs=1e-9)


def test_any_simplex_has_the_volume_of_its_convex_hull():
    points = np.random.default_rng(0).normal(size=(5, 4))
    assert volume.log_volume(points) == pytest.approx(math.log(ConvexHull(points).volume), abs=1e-9)


@pytest.mark.parametrize("away", [0, 20, 1e4])
def test_far_from_the_origin_the_volume_keeps_its_digits(away):
    points = np.random.default_rng(1).normal(size=(4, 9))
    assert volume.log_volume(points + away) == pytest.approx(volume.log_volume(points), abs=1e-9)


@pytest.mark.parametrize("edge", [0.3, 0.03, 0.01])
def test_a_combination_that_float32_rounded_counts_as_flat(edge):
    rng = np.random.default_rng(2)
    for _ in range(20):
        base = rng.normal(size=5000)
        steps = rng.normal(size=(2, 5000))
        two = base + edge * np.linalg.norm(base) * steps / np.linalg.norm(steps, axis=1, keepdims=True)
        flat = np.stack([base, *two, 0.2 * base + 0.5 * two[0] + 0.3 * two[1]]).astype(np.float32).astype(np.float64)
        assert volume.log_volume(flat) == -math.inf
        assert math.isfinite(volume.log_volume(flat[:3]))


@pytest.mark.parametrize(
    "simplexes", [[[0, 1, 2, 3]], [[0, 2, 3], [1, 2, 3]], [[0, 3], [1, 3], [2, 3]], [[0, 1, 3], [2, 3]]]
)  # fmt: skip
def test_the_gradient_is_a_finite_difference(simplexes):
    points = np.random.default_rng(2).normal(size=(4, 6))
    row = volume.gradient(points, simplexes, 3)
    assert row.sum() == pytest.approx(0, abs=1e-12)
    found = row @ points
    for axis in range(6):
        step = np.zeros_like(points)
        step[3, axis] = 1e-5
        up, down = (volume.log_complex(points + sign * step, simplexes) for sign in (1, -1))
        assert found[axis] == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    "points",
    [
        np.array([[0.0, 0], [1, 1], [2, 2]]),
        np.array([[0.0, 0], [1, 1], [1, 1]]),
        np.array([[0.5, 0.5], [0.5, 0.5], [1, 1]]),
        np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0.3, 0.3, 1e-7]]),
    ],
)
def test_a_flat_simplex_has_no_volume_and_no_gradient_but_never_nan(points):
    own = list(range(len(points)))
    assert volume.log_volume(points) == -math.inf
    assert (volume.gradient(points, [own], own[-1]) == 0).all()
    assert volume.shares(points, [own, own]) == pytest.approx([0.5, 0.5])


def test_shares_are_in_proportion_to_volume_and_survive_any_scale():
    points = np.array([[0.0, 0], [1, 0], [0, 1], [3, 0]])  # areas 1/2 and 3/2
    for scale in (1e-120, 1e120):
        assert volume.shares(scale * points, [[0, 1, 2], [0, 2, 3]]) == pytest.approx([0.25, 0.75])


def test_a_flat_simplex_beside_a_full_one_is_never_drawn():
    points = np.array([[0.0, 0], [1, 0], [0, 1], [2, 0]])
    assert volume.shares(points, [[0, 1, 2], [0, 1, 3]]) == pytest.approx([1, 0])


def test_dimensions_without_a_common_measure_get_their_share_of_the_simplexes():
    points = np.array([[0.0, 0], [1, 0], [0, 1], [0, 3]])
    found = volume.shares(points, [[0, 1, 2], [0, 2], [0, 3], [1, 2, 3]])
    assert found[[0, 3]].sum() == pytest.approx(0.5)
    assert found[2] == pytest.approx(3 * found[1])
