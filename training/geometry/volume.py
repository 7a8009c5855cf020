"""Volumes of simplexes in weight space (Benton et al. 2021, section 3), from the coordinates of their vertices.

The volume of a k-simplex is √det(G) / k!, with G the Gram matrix of its edges from one vertex. This is the product of
the heights of its vertices, each above the ones before it, divided by k!. It is computed from the heights, in float64
and as a logarithm, because in millions of dimensions the volume overflows or underflows, and because det(G) loses twice
as many digits. No weights are needed: gradients are coefficients over the vertices, because ∂ log V / ∂w_v is a
combination of edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.geometry.coefficients import Coefficients, Coordinates

Simplexes = Sequence[Sequence[int]]  # vertex indices of each simplex

# A height below this share of the largest vertex's norm is a rounding error: weights are float32, so that even an exact
# combination of the others has a height of up to 2⁻²⁴ of its norm. A simplex with such a vertex is flat.
FLAT = 2.0**-22


def log_volume(positions: Coordinates) -> float:
    """Log of the volume of the simplex that all vertices span; −inf if it is flat, 0 for a single vertex."""
    over = heights(positions)
    if (over <= lowest(positions)).any():
        return -math.inf
    return float(np.log(over).sum()) - math.lgamma(len(positions))


def lowest(positions: Coordinates) -> float:
    """The height up to which a vertex counts as a combination of the others."""
    return FLAT * float(np.linalg.norm(positions, axis=1).max())


def log_volumes(positions: Coordinates, simplexes: Simplexes) -> NDArray[np.float64]:
    """Log-volume of each simplex."""
    return np.array([log_volume(positions[own]) for own in map(list, simplexes)])


def shares(positions: Coordinates, simplexes: Simplexes) -> NDArray[np.float64]:
    """The probability of each simplex when a point is drawn uniformly from a complex: its share of the volume.

    Volumes of different dimensions cannot be compared. So the probability of a dimension is its share of the number of
    simplexes, which is divided among them by volume; equally if all simplexes of the dimension are flat.
    """
    logs = log_volumes(positions, simplexes)
    dimensions = np.array([len(own) for own in simplexes])
    found = np.zeros(len(logs))
    for dimension in set(dimensions.tolist()):
        of = dimensions == dimension
        largest = logs[of].max()
        volumes = np.exp(logs[of] - largest) if np.isfinite(largest) else np.ones(of.sum())
        found[of] = of.mean() * volumes / volumes.sum()
    return found


def log_complex(positions: Coordinates, simplexes: Simplexes) -> float:
    """Log of the complex's volume, the sum of its simplexes' volumes.

    With simplexes of several dimensions: the mean, over the simplexes, of the log-volume of their dimension.
    """
    logs = log_volumes(positions, simplexes)
    dimensions = np.array([len(own) for own in simplexes])
    total = 0.0
    for dimension in set(dimensions.tolist()):
        of = dimensions == dimension
        total += float(of.mean() * np.logaddexp.reduce(logs[of]))
    return total


def gradient(positions: Coordinates, simplexes: Simplexes, vertex: int) -> Coefficients:
    """∂ log_complex / ∂w_vertex = Σ_v c_v w_v: the coefficients, (vertices,). They sum to 0.

    Flat simplexes have no gradient; they contribute 0.
    """
    found = np.zeros(len(positions))
    for own, share in zip(map(list, simplexes), shares(positions, simplexes), strict=True):
        if vertex not in own or not math.isfinite(log_volume(positions[own])):
            continue
        # With `vertex` as the last: ∂ log V / ∂w = Σ_j (G⁻¹)_kj e_j, over the edges e_j = w_j − w_0, and G = RᵀR.
        ordered = [v for v in own if v != vertex] + [vertex]
        factor: Any = np.linalg.qr((positions[ordered[1:]] - positions[ordered[0]]).T, mode="r")
        one = np.zeros(len(ordered) - 1)
        one[-1] = 1
        inverse = np.linalg.solve(factor, np.linalg.solve(factor.T, one))
        found[ordered[1:]] += share * inverse
        found[ordered[0]] -= share * inverse.sum()
    return found


def heights(positions: Coordinates) -> NDArray[np.float64]:
    """Distance of each vertex but the first from the plane through those before it: (k,), in units of the weights."""
    edges = (positions[1:] - positions[0]).T
    if edges.shape[0] < edges.shape[1]:  # more edges than dimensions
        edges = np.pad(edges, ((0, edges.shape[1] - edges.shape[0]), (0, 0)))
    return np.abs(np.diag(np.linalg.qr(edges, mode="r")))
