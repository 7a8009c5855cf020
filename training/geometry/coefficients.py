"""Points between vertices, as coefficients over them: w = Σ_v c_v w_v.

For a curve at t (Garipov et al. 2018, section 3):

    segment     (1 − t, t)
    polychain   hat functions on the grid i / (n + 1): straight from vertex to vertex
    bezier      Bernstein polynomials of degree n + 1

n is the number of bends (interior vertices). The ends are the first and the last vertex.
For a simplex, or for a complex of several simplexes (Benton et al. 2021, section 3): drawn uniformly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Shape = Literal["segment", "polychain", "bezier"]
Coefficients = NDArray[np.float64]  # (points, vertices); a row sums to 1
Coordinates = NDArray[np.float64]  # (vertices, axes): of weight sets, in an orthonormal basis of their span


def curve(shape: Shape, t: ArrayLike, bends: int) -> Coefficients:
    """Coefficients of the points at `t` (points,) in [0, 1]: (points, bends + 2).

    Raises:
        ValueError: a t outside [0, 1], fewer than 0 bends, or a segment with bends.
    """
    at = np.atleast_1d(np.asarray(t, np.float64))
    if not ((at >= 0) & (at <= 1)).all():
        raise ValueError(f"t must lie in [0, 1]; got {at.min()} … {at.max()}.")
    if bends < 0 or (shape == "segment" and bends):
        raise ValueError(f"A {shape} cannot have {bends} bends.")
    degree = bends + 1
    vertex = np.arange(degree + 1)
    if shape == "bezier":
        binomial = np.array([math.comb(degree, int(i)) for i in vertex], np.float64)
        return binomial * at[:, None] ** vertex * (1 - at[:, None]) ** (degree - vertex)
    return np.maximum(0, 1 - np.abs(at[:, None] * degree - vertex))


def on_the_segment(bends: int) -> Coefficients:
    """Initial bends, as coefficients over the two ends, (bends, 2): evenly spaced on the straight line."""
    return curve("segment", np.arange(1, bends + 1) / (bends + 1), 0)


def over_all(own: Coefficients, vertices: tuple[int, ...], total: int) -> Coefficients:
    """Coefficients over some vertices, as coefficients over all `total` of them."""
    wide = np.zeros((len(own), total))
    wide[:, list(vertices)] = own
    return wide


def chords(points: Coefficients, positions: Coordinates) -> NDArray[np.float64]:
    """Distances between successive points, in the units of the weights: (points − 1,).

    Args:
        points: (points, vertices), in their order along the path.
        positions: coordinates of the vertices.
    """
    return np.linalg.norm(np.diff(points, axis=0) @ positions, axis=1)


def distances(positions: Coordinates) -> NDArray[np.float64]:
    """Distances between each two vertices: (vertices, vertices)."""
    return np.linalg.norm(positions[:, None] - positions[None], axis=2)


def mean_over_t(t: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """∫ f(t) dt by the trapezoidal rule: the expectation over uniform t (eq. 2)."""
    return float(np.trapezoid(values, t))


def mean_over_length(lengths: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """The average over arc length (eq. 1), from the chords between the points; NaN if the path has no length."""
    total = lengths.sum()
    return float(((values[1:] + values[:-1]) / 2 @ lengths) / total) if total > 0 else math.nan


def uniform(generator: np.random.Generator, count: int, vertices: int) -> Coefficients:
    """Points drawn uniformly from a simplex, Dirichlet(1, …, 1): (count, vertices)."""
    return generator.dirichlet(np.ones(vertices), count)


def uniform_over(
    generator: np.random.Generator,
    count: int,
    simplexes: Sequence[Sequence[int]],
    shares: NDArray[np.float64],
    total: int,
) -> Coefficients:
    """Points drawn from a complex, as coefficients over its `total` vertices: (count, total).

    Each point is uniform in a simplex, which is drawn with the probabilities `shares`.
    """
    chosen = generator.choice(len(simplexes), count, p=shares)
    points = np.zeros((count, total))
    for number, own in enumerate(simplexes):
        of = np.flatnonzero(chosen == number)
        points[of[:, None], list(own)] = uniform(generator, len(of), len(own))
    return points
