"""The table, the figure and the checks, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from tabulate import tabulate

Cell = dict[str, Any]  # a place and what was found there; of one seed, or of all together
SQUARES = ("square", "square, jittered")
HOPS = ("hopskipjump", "hopskipjump, jittered")
QUERIES = (*SQUARES, *HOPS)
BLACK = (*QUERIES, "surrogate", "noise")
ELSEWHERE = ("endpoint", "midpoint")  # with the weights of one network
WHITE = ("pgd", "eot", "arc", "autoattack")
MATCHED = 0.003


def shares(cells: Iterable[Cell]) -> NDArray[np.float64]:
    """Of each image's answers, the share that is wrong; the images of all seeds in order."""
    return np.concatenate([np.array(cell["wrong"]) / cell["asked"] for cell in sorted(cells, key=lambda c: c["seed"])])


def errors(clean: Iterable[Cell]) -> dict[str, float]:
    """Clean error of each arm, the mean over the seeds."""
    found: dict[str, list[float]] = {}
    for cell in clean:
        found.setdefault(cell["arm"], []).append(cell["error"])
    return {arm: float(np.mean(values)) for arm, values in found.items()}


def unmatched(clean: dict[str, float], allowed: Set[str]) -> str:
    """Which arms are too far from the first one, but for those that may be; for people."""
    first = next(iter(clean.values()))
    return "; ".join(
        f"{arm} {100 * (error - first):+.2f}"
        for arm, error in clean.items()
        if abs(error - first) > MATCHED and arm not in allowed
    )


def pooled(cells: Sequence[Cell]) -> Cell:
    """Several seeds' cells of one attack as one; intervals are over all their images together."""
    wrong = shares(cells)
    lost = int((wrong > 0.5).sum())
    majority = stats.binomtest(lost, len(wrong)).proportion_ci(method="wilson")
    low, high = interval(wrong)
    nows = [one for cell in cells if cell["now"] is not None for one in cell["now"]]
    return {
        **{key: value for key, value in cells[0].items() if key not in ("wrong", "asked", "seed")},
        "m": "/".join(str(m) for m in sorted({cell["m"] for cell in cells})),
        "answers": float(np.mean([cell["answers"] for cell in cells])),
        "error": float(wrong.mean()), "low": low, "high": high,
        "majority": lost / len(wrong), "majority_low": float(majority.low), "majority_high": float(majority.high),
        "now": float(np.mean(nows)) if nows else None, "of": len(wrong),
    }  # fmt: skip


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Of the mean over images, 95 %: bootstrap."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(0), method="percentile").confidence_interval
    return float(found.low), float(found.high)


def adapted(cells: Sequence[Cell]) -> list[Cell]:
    """A cell for each seed, with the attack and the number of averaged answers that were best on the other seeds: not chosen on what is reported."""

    def way(cell: Cell) -> tuple[str, int]:
        return cell["attack"], cell["m"]

    found: list[Cell] = []
    for seed in sorted({cell["seed"] for cell in cells}):
        elsewhere = [cell for cell in cells if cell["seed"] != seed] or cells
        best = max(
            sorted(set(map(way, cells))),
            key=lambda one: shares([cell for cell in elsewhere if way(cell) == one]).mean(),
        )
        found += [cell for cell in cells if cell["seed"] == seed and way(cell) == best]
    return found


def shown(cell: Cell) -> str:
    """Mean error and its interval; share lost by majority and its interval; how many answers were averaged, where that was a choice."""
    now = f", {100 * cell['now']:.0f} until the key turns" if cell["now"] is not None else ""
    averaged = f", m {cell['m']}" if cell["m"] != "1" else ""
    return (
        f"{100 * cell['error']:.0f} ({100 * cell['low']:.0f}–{100 * cell['high']:.0f}); "
        f"{100 * cell['majority']:.0f} ({100 * cell['majority_low']:.0f}–{100 * cell['majority_high']:.0f}){averaged}{now}"
    )


@dataclass(frozen=True)
class Report:
    """All that was measured, and what is said of it."""

    cells: list[Cell]  # of each seed
    clean: dict[str, float]  # errors by arm
    epsilon: float
    far: float  # within which HopSkipJump's images count
    budget: int

    def of(self, arm: str, attack: str, *, epsilon: float | None = None, budget: int | None = None) -> list[Cell]:
        """The cells of an attack on an arm, of all seeds."""
        usual = self.far if attack.startswith("hop") else self.epsilon
        place = {"arm": arm, "attack": attack, "epsilon": epsilon or usual, "budget": budget or self.budget}
        return [cell for cell in self.cells if all(cell[key] == value for key, value in place.items())]

    def summary(self) -> str:
        """An arm a row."""
        columns = ("none", *BLACK, *ELSEWHERE, *WHITE)
        rows = []
        for arm, error in self.clean.items():
            found = [self.of(arm, attack) for attack in columns]
            rows.append([arm, f"{100 * error:.2f}", *(shown(pooled(adapted(own))) if own else "" for own in found)])
        return tabulate(rows, ["arm", "clean", *columns], tablefmt="github", disable_numparse=True)

    def differences(self, beside: str) -> str:
        """How much more each arm errs than another one, under the same attack on the same images."""
        columns = (("none",), SQUARES, HOPS, ("surrogate",), ("eot",), ("arc",))
        rows = []
        for arm in self.clean:
            row = [arm]
            for attacks in columns:
                mine = [cell for attack in attacks for cell in self.of(arm, attack)]
                if not mine:
                    row.append("")
                    continue
                more = shares(adapted(mine)) - shares(adapted(self.of(beside, attacks[0])))
                low, high = interval(more)
                row.append(f"{100 * more.mean():+.0f} ({100 * low:+.0f} … {100 * high:+.0f})")
            rows.append(row)
        return tabulate(rows, ["arm", *(attacks[0] for attacks in columns)], tablefmt="github", disable_numparse=True)

    def worst(self, arm: str, attacks: Sequence[str], epsilon: float) -> float | None:
        """The largest error that one of the attacks reaches within ε; None where none of them was tried."""
        return max((pooled(adapted(own))["error"] for attack in attacks if (own := self.of(arm, attack, epsilon=epsilon))), default=None)  # fmt: skip

    def checks(self, largest: float) -> list[str]:
        """What an honest evaluation shows of itself, a line an arm."""

        def beside(within: str, white: float | None, black: float | None) -> str:
            if white is None or black is None:
                return ""
            return f"; white-box {100 * white:.0f} % against black-box {100 * black:.0f} %{within}{'' if white >= black else ' (WEAKER)'}"

        found: list[str] = []
        first = next(iter(self.clean.values()))
        for arm, error in self.clean.items():
            near, far = (
                (self.worst(arm, WHITE, epsilon), self.worst(arm, attacks, epsilon))
                for epsilon, attacks in ((self.epsilon, BLACK), (self.far, QUERIES))
            )
            away, last = error - first, self.worst(arm, WHITE, largest)
            found.append(
                f"- {arm}: clean error {100 * away:+.2f} points from the first arm's{'' if abs(away) <= MATCHED else ' (NOT matched)'}"
                + beside("", *near)
                + beside(" where HopSkipJump counts", *far)
                + ("." if last is None else f"; {100 * last:.0f} % at ε {largest:.2g}.")
            )
        return found

    def everything(self) -> str:
        """Every cell, its seeds together."""
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in self.cells:
            key = tuple(cell[name] for name in ("arm", "attack", "epsilon", "m", "budget"))
            groups.setdefault(key, []).append(cell)
        keys = ("arm", "attack", "epsilon", "m", "budget", "answers", "error", "low", "high", "majority", "of")
        rows = [
            [f"{cell[key]:.3g}" if isinstance(cell[key], float) else cell[key] for key in keys]
            for cell in map(pooled, groups.values())
        ]
        return tabulate(rows, keys, tablefmt="github", disable_numparse=True)


def figure(report: Report, steady: int, short: Sequence[int], file: Path) -> None:
    """Errors against answers, and accuracy that is left against ε: for each arm the same attacks at every place.

    They are Square (jittered, too, where there is a key) with any of `short` answers averaged, and Square with `steady` ones beside EOT-PGD; one, where answers repeat.
    """
    drawn = Figure(figsize=(13, 5), layout="constrained")
    queries, robust = drawn.subplots(1, 2)
    budgets = sorted({cell["budget"] for cell in report.cells})
    epsilons = sorted({cell["epsilon"] for cell in report.cells})
    for arm in report.clean:
        reached, left = {}, {}
        for budget in budgets:
            each = [[c for c in report.of(arm, attack, budget=budget) if c["m"] in short] for attack in SQUARES]
            if any(each):
                reached[budget] = 100 * max(pooled(adapted(own))["error"] for own in each if own)
        for epsilon in epsilons:
            each = [report.of(arm, "eot", epsilon=epsilon)]
            for attack in SQUARES:
                own = report.of(arm, attack, epsilon=epsilon)
                each.append([c for c in own if c["m"] == steady or {cell["m"] for cell in own} == {1}])
            if any(each):
                left[epsilon] = 100 * (1 - max(pooled(own)["error"] for own in each if own))
        queries.plot(list(reached), list(reached.values()), "o-", label=arm)
        robust.plot(list(left), list(left.values()), "o-", label=arm)
    queries.set(
        xlabel="answers for each image",
        ylabel=f"error when asked again, % (Square, ε {report.epsilon:.2g})",
        xscale="log",
    )
    robust.set(xlabel="ε (L∞)", ylabel="accuracy left by Square and EOT-PGD, %", xscale="log")
    robust.legend(fontsize=7)
    drawn.savefig(file, dpi=130)
