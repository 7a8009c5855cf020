"""Does what arrives still look like the calibration images? A sequential test, and the bins of a stability index.

The test ranks each new value among the calibration values and all values before it. If all of them are exchangeable,
these ranks are independent and uniform p-values (Vovk et al. 2005, "Algorithmic Learning in a Random World", section 2.6; ties are broken
at random). Betting against uniformity then multiplies a capital whose expectation does not grow. The Shiryaev-Roberts
statistic R ← (R + 1) · bet(p) adds a new unit of capital at each value, so that a change is found whenever it comes. Its
expectation after n values is n, and R is a submartingale, so Doob's inequality bounds false alarms:

    P(R reaches HORIZON / FALSE_ALARMS within HORIZON values) ≤ FALSE_ALARMS

Values that several processes test separately add up: HORIZON counts them all. Each of `count` measures gets the share
FALSE_ALARMS / count. After an alarm the test starts again with the calibration values only, so a lasting change is reported again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models_store.inputs import kinds
from models_store.inputs.kinds import Inputs
from models_store.uncertainty import Floats, Prediction

MEASURES = ("predictive_entropy", "novelty", "input_mean", "input_std", "predicted")
FALSE_ALARMS = 0.01  # probability of any false alarm, of all measures of a version together
HORIZON = 1_000_000  # rows
PSI_BINS = 10
_CELLS = 1000  # between order statistics of the calibration values; ranks within a cell are not kept
_NOISE = 1e-9
_P_BINS = 10  # of the density of p-values that the adaptive bet follows
_TOGETHER = 200  # values that are ranked at once
_MEMORY = 200  # p-values that the adaptive bet remembers, about
_PRIOR = 2.0  # imagined p-values in each bin
_POWERS = (0.2, 0.5, 0.8)  # of the bets on small and on large p-values


def statistics(images: Inputs, prediction: Prediction) -> dict[str, Floats]:
    """The values of MEASURES for some inputs (batch, *shape), (batch,) each."""
    mean, std = kinds.statistics(images)
    return {
        "predictive_entropy": prediction.predictive_entropy,
        "novelty": prediction.novelty,
        "input_mean": mean,
        "input_std": std,
        "predicted": prediction.label.astype(np.float64),
    }


class SequentialTest:
    """Tests whether values of one measure are exchangeable with the calibration values. Not thread-safe."""

    def __init__(self, calibration: Floats, count: int = len(MEASURES), seed: int | None = None):
        """Begin a test.

        Args:
            calibration: values of the calibration images.
            count: number of measures that share FALSE_ALARMS.
            seed: of the random numbers that break ties; None: from the operating system.
        """
        self._random = np.random.default_rng(seed)
        ordered = np.sort(self._untied(calibration))
        size = len(ordered)
        edges = np.unique(np.linspace(1, size, min(size, _CELLS)).astype(int))  # ranks, from 1
        self._edges = ordered[edges - 1]
        # n values leave n + 1 gaps, and the next value falls into each of them with the same probability.
        self._start = np.diff([0, *edges.tolist(), size + 1])
        self._limit = HORIZON * count / FALSE_ALARMS
        self.rows = 0  # values that were tested
        self._restart()

    @property
    def evidence(self) -> float:
        """The statistic R, the mean over all bets; an alarm is raised when it reaches the limit."""
        return sum(self._capital) / len(self._capital)

    def add(self, values: Floats) -> int:
        """Test values in the order in which they came; return the number of alarms."""
        alarms = 0
        while len(values):
            passed = self._until_alarm(values[:_TOGETHER])
            if passed is not None:
                alarms += 1
                self._restart()
            values = values[passed or _TOGETHER :]
        return alarms

    def _until_alarm(self, values: Floats) -> int | None:
        """Test values until an alarm; return how many were tested by then, or None without an alarm."""
        p = self.p_values(values)
        low, high = np.maximum(p, 1e-12), np.maximum(1 - p, 1e-12)
        fixed = [power * side ** (power - 1) for power in _POWERS for side in (low, high)]
        bins = np.minimum((p * _P_BINS).astype(int), _P_BINS - 1).tolist()
        capital = self._capital
        for number, (bin_, *bets) in enumerate(zip(bins, *(bet.tolist() for bet in fixed), strict=True)):
            bets.append(self._adaptive(bin_))
            capital = [(one + 1) * bet for one, bet in zip(capital, bets, strict=True)]
            self.rows += 1
            if sum(capital) >= self._limit * len(capital):
                return number + 1
        self._capital = capital
        return None

    def p_values(self, values: Floats) -> Floats:
        """Rank new values among the calibration values and all values before them, and remember them: (values,).

        The gaps between earlier values are counted by cell: a new value falls into a cell with the probability
        gaps in the cell / all gaps, and splits the gap that it falls into. Within a cell its place is drawn at random.
        """
        cells = np.searchsorted(self._edges, self._untied(values), side="right")
        up_to = np.cumsum(self._gaps)
        above, equal = up_to[-1] - up_to[cells], self._gaps[cells]
        earlier = np.tri(len(cells), k=-1, dtype=bool)  # among the new values themselves
        above = above + (earlier & (cells > cells[:, None])).sum(axis=1)
        equal = equal + (earlier & (cells == cells[:, None])).sum(axis=1)
        total = up_to[-1] + np.arange(len(cells))
        self._gaps = self._gaps + np.bincount(cells, minlength=len(self._gaps))
        return (above + self._random.random(len(cells)) * equal) / total

    def _untied(self, values: Floats) -> Floats:
        """Values with a little noise, so that no two are equal: any change that treats all values alike keeps them exchangeable."""
        return values + self._random.random(len(values)) * _NOISE

    def _adaptive(self, bin_: int) -> float:
        """The bet that follows the density of recent p-values; it learns from this one for the bets that follow."""
        density = (_PRIOR + self._heard[bin_] / self._unit) * _P_BINS / (_P_BINS * _PRIOR + self._all / self._unit)
        self._unit *= 1 + 1 / _MEMORY  # instead of making all that was heard before smaller
        self._heard[bin_] += self._unit
        self._all += self._unit
        if self._unit > 1e100:
            self._heard, self._all = [one / self._unit for one in self._heard], self._all / self._unit
            self._unit = 1.0
        return density

    def _restart(self) -> None:
        self._gaps = self._start
        self._capital = [0.0] * (2 * len(_POWERS) + 1)
        self._heard, self._all, self._unit = [0.0] * _P_BINS, 0.0, 1.0


class Bins:
    """Bins of one measure for the population stability index: deciles of the calibration values, or the predicted classes.

    Of more than PSI_BINS classes neighbours share a bin: the index of unchanged data grows with the number of bins.
    """

    def __init__(self, measure: str, calibration: Floats):
        if measure == "predicted" and calibration.max(initial=0) < PSI_BINS:
            self._edges = np.arange(0.5, calibration.max(initial=0) + 0.5)
        else:
            self._edges = np.unique(np.quantile(calibration, np.linspace(0, 1, PSI_BINS + 1)[1:-1]))
        self.calibration = self.counts(calibration)  # number of calibration values in each bin

    def counts(self, values: Floats) -> NDArray[np.intp]:
        """Number of values in each bin."""
        return np.bincount(np.searchsorted(self._edges, values, side="right"), minlength=len(self._edges) + 1)


def stability_index(calibration: NDArray[np.integer], live: NDArray[np.integer]) -> float:
    """Population stability index Σ (live − calibration) · ln(live / calibration) of shares by bin; at least 1e-4 each."""
    a, b = (np.maximum(counts / counts.sum(), 1e-4) for counts in (calibration, live))
    return float(((b - a) * np.log(b / a)).sum())
