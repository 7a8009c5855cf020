"""The tables of results/regimes.md."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats
from tabulate import tabulate

from benchmarks.regimes import fitted

CHOICES = {
    "snapshots": [f"snapshots, {count} cycles" for count in fitted.SNAPSHOTS],
    "FGE of a finished network": [f"6 % more, FGE α1 {high:g}" for high, _ in fitted.RATES],
    "SWAG": ["6 % more, SWAG 0.05", "6 % more, SWAG 0.01"],
    "ESPRO": [f"6 % more, ESPRO λ {weight:g}" for weight in fitted.LAMBDAS],
}
Arms = dict[str, dict[str, float]]


def text() -> str:
    """All tables, of the tasks that have been measured."""
    parts = ["# Where networks fit their training images", "", (fitted.__doc__ or "").split("\n\n")[2].strip(), ""]
    for task in fitted.TASKS:
        found = {row["seed"]: row["arms"] for row in fitted.lines() if row["task"] == task and "arms" in row}
        confirming = [found[seed] for seed in fitted.CONFIRMING if seed in found]
        choosing = [found[seed] for seed in fitted.CHOOSING if seed in found]
        if not choosing:
            continue
        if not confirming:  # what was found so far
            confirming = choosing
        chosen = {kind: _best(choosing, names) for kind, names in CHOICES.items()}
        seeds = [seed for seed in fitted.CONFIRMING if seed in found]
        if seeds:
            parts += [f"## {task}: seeds {', '.join(map(str, seeds))}", ""]
        else:
            parts += [
                f"## {task}: seed 0 alone",
                "",
                "**Not confirmed**: the alternatives are chosen on this seed, and no other has been measured yet.",
                "",
            ]
        parts += [
            "Chosen on seed 0: " + "; ".join(f"{name.removeprefix('6 % more, ')}" for name in chosen.values()) + ".",
            "",
        ]
        parts += [_table(confirming, _from_one_budget(chosen), "independent × 1"), ""]
        parts += ["A finished network (B) and 3 further epochs, 6 % of B:", ""]
        parts += [_table(confirming, _from_a_network(chosen), "6 % more, at the last rate × 1"), ""]
        parts += ["All alternatives of the choice, one run of each:", ""]
        parts += [
            _table(
                confirming, [(f"{name} × 1", "") for names in CHOICES.values() for name in names], "independent × 1"
            ),
            "",
        ]
    return "\n".join(parts)


def _best(choosing: list[Arms], names: list[str]) -> str:
    return min(names, key=lambda name: np.mean([arms[f"{name} × 1"]["validation_nll"] for arms in choosing]))


def _from_one_budget(chosen: dict[str, str]) -> list[tuple[str, str]]:
    return [
        ("independent × 1", "1B"), ("FGE × 1", "1B"), (f"{chosen['snapshots']} × 1", "1B"),
        ("independent × 2", "2B"), ("FGE × 2", "2B"), (f"{chosen['snapshots']} × 2", "2B"), ("twice as long × 1", "2B"),
        ("independent × 3", "3B"), ("FGE × 3", "3B"), (f"{chosen['snapshots']} × 3", "3B"),
    ]  # fmt: skip


def _from_a_network(chosen: dict[str, str]) -> list[tuple[str, str]]:
    names = [
        "independent", "6 % more, at the last rate", "6 % more, restarted", "6 % more, restarted, and the base", chosen["FGE of a finished network"], chosen["SWAG"], chosen["ESPRO"],
    ]  # fmt: skip
    return [(f"{name} × 1", "1B" if name == "independent" else "1.06B") for name in names]


def _table(found: list[Arms], arms: list[tuple[str, str]], against: str) -> str:
    """Means over seeds, and paired differences of error and NLL from the arm `against`; negative is better."""
    rows: list[list[Any]] = []
    for name, cost in arms:
        own = [one[name] for one in found]
        mean = {
            key: float(np.nanmean([one[key] for one in own]))
            if not np.isnan([one[key] for one in own]).all()
            else float("nan")
            for key in own[0]
        }
        rows.append(
            [
                name, cost, f"{100 * mean['test_error']:.2f}", _paired(found, name, against, "test_error", 100), f"{mean['test_nll']:.4f}", _paired(found, name, against, "test_nll", 1),
                f"{100 * mean['test_member_error']:.2f}", f"{100 * mean['train_accuracy']:.2f}", f"{100 * mean['disagreement']:.2f}" if not np.isnan(mean["disagreement"]) else "",
            ]
        )  # fmt: skip
    heads = [
        "arm × runs averaged", "cost", "error, %", f"less that of {against}, points", "NLL", f"less that of {against}", "networks' own error, %", "their train accuracy, %",
        "disagreement of two, %",
    ]  # fmt: skip
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def _paired(found: list[Arms], name: str, against: str, key: str, scale: float) -> str:
    if name == against:
        return ""
    differences = scale * np.array([one[name][key] - one[against][key] for one in found])
    digits = 2 if scale == 100 else 4
    if len(differences) == 1:
        return f"{differences[0]:+.{digits}f}"
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    return f"{differences.mean():+.{digits}f} ± {half:.{digits}f}"
