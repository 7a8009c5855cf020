"""A Gaussian over weights, computed from the weight sets that SGD passed through (SWAG; Maddox et al. 2019).

Mean and variance are those of all weight sets; the low-rank part D holds the last K deviations from the running mean. A
sample is w̄ + σ ⊙ z₁ / √2 + D z₂ / √(2 (K − 1)), where z₁ has one number for each weight and z₂ one for each of the K
deviations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence

import torch

from training.geometry.vertices import State


class Gaussian:
    """Mean, variances and deviations of the named parameters; all else is taken from the last weight set."""

    def __init__(self, states: Iterable[State], parameters: Collection[Sequence[str]], rank: int):
        """Read the weight sets once, holding no more than `rank` + 2 in memory.

        Args:
            states: full state dicts in the order of the training; at least two.
            parameters: the names of each random parameter; a tied parameter has several.
            rank: number of last deviations that are used; at least 2.

        Raises:
            ValueError: fewer than two weight sets, or a rank below 2.
        """
        kept: deque[State] = deque(maxlen=rank)
        count, last = 0, {}
        self.mean: State = {}
        self.variance: State = {}
        for count, last in enumerate(states, 1):
            deviation: State = {}
            for name, *_ in parameters:
                weight = last[name].detach().float()
                if count == 1:
                    self.mean[name], self.variance[name] = weight.clone(), torch.zeros_like(weight)
                # Welford's update: the mean of squares minus the square of the mean would leave only rounding errors.
                before = weight - self.mean[name]
                self.mean[name] += before / count
                deviation[name] = weight - self.mean[name]
                self.variance[name] += (before * deviation[name] - self.variance[name]) / count
            kept.append(deviation)
        if count < 2 or rank < 2:
            raise ValueError(f"A Gaussian needs two weight sets and rank 2; got {count} and {rank}.")
        self.deviations = list(kept)
        self._last, self._parameters = last, parameters

    def sample(self, generator: torch.Generator) -> State:
        """Returns a random weight set."""
        columns = len(self.deviations)
        shared = torch.randn(columns, generator=generator) / (2 * (columns - 1)) ** 0.5
        drawn: State = {}
        for name, mean in self.mean.items():
            own = torch.randn(mean.shape, generator=generator)
            drawn[name] = mean + self.variance[name].clamp_min(0).sqrt() * own * 0.5**0.5
            for deviation, z in zip(self.deviations, shared.tolist(), strict=True):
                drawn[name].add_(deviation[name], alpha=z)
        return self._whole(drawn)

    def middle(self) -> State:
        """Returns the mean: stochastic weight averaging (Izmailov et al. 2018)."""
        return self._whole(self.mean)

    def _whole(self, weights: State) -> State:
        found = dict(self._last)
        for names in self._parameters:
            for name in names:
                found[name] = weights[names[0]].to(self._last[name].dtype)
        return found
