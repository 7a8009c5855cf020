import numpy as np
import pytest
from scipy import stats
from scipy.interpolate import BPoly

pytest.importorskip("torch", reason="the training extra is not installed")

from training.geometry import coefficients

T = np.linspace(0, 1, 61)
BENDS = range(6)


@pytest.mark.parametrize("bends", BENDS)
def test_bezier_is_scipys_bernstein_basis(bends):
    found = coefficients.curve("bezier", T, bends)
    for vertex in range(bends + 2):
        basis = np.zeros((bends + 2, 1))
        basis[vertex] = 1
        assert found[:, vertex] == pytest.approx(BPoly(basis, [0, 1])(T), abs=1e-12)


@pytest.mark.parametrize("bends", BENDS)
def test_polychain_is_numpys_interpolation(bends):
    found = coefficients.curve("polychain", T, bends)
    grid = np.linspace(0, 1, bends + 2)
    for vertex in range(bends + 2):
        assert found[:, vertex] == pytest.approx(np.interp(T, grid, np.eye(bends + 2)[vertex]), abs=1e-12)


@pytest.mark.parametrize("shape", ["bezier", "polychain", "segment"])
@pytest.mark.parametrize("bends", BENDS)
def test_every_point_is_a_mean_of_the_vertices_and_the_ends_are_vertices(shape, bends):
    bends = 0 if shape == "segment" else bends
    found = coefficients.curve(shape, T, bends)
    assert found.shape == (61, bends + 2)
    assert (found >= 0).all()
    assert found.sum(axis=1) == pytest.approx(1, abs=1e-12)
    assert (found[0] == np.eye(bends + 2)[0]).all()
    assert (found[-1] == np.eye(bends + 2)[-1]).all()


def test_with_bends_on_the_segment_every_shape_is_the_segment():
    ends = np.array([[0.0, 0, 0], [1, 2, 3]])
    for shape in ("bezier", "polychain"):
        for bends in range(1, 6):
            vertices = np.vstack([ends[:1], coefficients.on_the_segment(bends) @ ends, ends[1:]])
            found = coefficients.curve(shape, T, bends) @ vertices
            assert found == pytest.approx(coefficients.curve("segment", T, 0) @ ends, abs=1e-12)


def test_what_is_no_point_is_refused():
    with pytest.raises(ValueError, match="lie in"):
        coefficients.curve("bezier", 1.1, 1)
    with pytest.raises(ValueError, match="segment cannot have 1"):
        coefficients.curve("segment", 0.5, 1)


def test_chords_and_averages_of_a_known_path():
    """A right angle with legs 3 and 1: uniform in t, each leg has weight ½; uniform in length, the ratio is 3 to 1."""
    vertices = np.array([[0.0, 0], [3, 0], [3, 1]])
    points = coefficients.curve("polychain", T, 1)
    lengths = coefficients.chords(points, vertices)
    assert lengths.sum() == pytest.approx(4)
    value = np.where(T < 0.5, 1.0, np.where(T > 0.5, 2.0, 1.5))
    assert coefficients.mean_over_t(T, value) == pytest.approx(1.5)
    assert coefficients.mean_over_length(lengths, value) == pytest.approx(1.25, abs=0.02)


def test_the_length_of_a_bezier_curve_is_its_arc_length():
    from scipy.integrate import quad

    vertices = np.array([[0.0, 0], [1, 3], [2, 0]])
    speed = lambda t: np.hypot(*(2 * (1 - t) * (vertices[1] - vertices[0]) + 2 * t * (vertices[2] - vertices[1])))  # noqa: E731
    found = coefficients.chords(coefficients.curve("bezier", T, 1), vertices).sum()
    assert found == pytest.approx(quad(speed, 0, 1)[0], rel=1e-3)


def test_each_coefficient_of_a_uniform_draw_from_a_simplex_is_beta_distributed():
    for k in (1, 2, 5):
        drawn = coefficients.uniform(np.random.default_rng(k), 4000, k + 1)
        assert drawn.sum(axis=1) == pytest.approx(1)
        for column in drawn.T:
            assert stats.kstest(column, stats.beta(1, k).cdf).pvalue > 1e-3


def test_points_of_a_complex_fall_into_its_simplexes_in_proportion_to_the_shares():
    simplexes, shares = [[0, 2, 3], [1, 2, 3], [2, 3, 4]], np.array([0.2, 0.5, 0.3])
    drawn = coefficients.uniform_over(np.random.default_rng(0), 5000, simplexes, shares, 5)
    counts = [(drawn[:, vertex] > 0).sum() for vertex in (0, 1, 4)]
    assert sum(counts) == len(drawn)
    assert stats.chisquare(counts, 5000 * shares).pvalue > 1e-3
    assert drawn.sum(axis=1) == pytest.approx(1)
