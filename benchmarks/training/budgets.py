"""Ensembles at equal cost: independent networks, snapshots, FGE and curves at 1, 2 and 3 budgets, with and without temperature.

    python -m benchmarks.training.budgets [--seeds N]     train what is missing (of the first N seeds), then print and keep results/budgets.md

Fixed beforehand, for all methods alike: preresnet8 on all of Fashion-MNIST, B = 10 epochs, the data set's own augmentation,
rate 0.1, weight decay 3e-4, seeds 0, 1, 2. FGE with the paper's shares and rates (80 % plain, 0.05 to 5e-4, 6 members a run),
snapshots with 5 cycles a run. Nothing was searched. The curve joins the first two independent networks and is trained for one budget, so that it costs
3B in all; 6 equally spaced points of it are averaged. cSG-MCMC with its defaults (4 cycles of 3 samples a run), a greedy soup of the last 5
epochs; both were measured later, on other hardware than the rest. Batch norm is re-estimated for every network (methods do that). Methods resume, so this does too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training.comparison import Arm, measure, spent, table
from models_store.store import Store, Version
from training import csgmcmc, curve, fge, independent, snapshot, soup
from training.measurement.probing import Kept

SEEDS = (0, 1, 2)
B = 10
COMMON = {"dataset": "fashion-mnist", "network": "preresnet8", "epochs": B, "activate": False}
RESULTS = Path(__file__).parents[1] / "results"


def trained(method, seed: int, **options) -> Version:
    return method.run(method.Config(name=f"budgets-{method.Config.method}-{seed}", seed=seed, **COMMON, **options))


def independents(seed: int) -> Version:
    return trained(independent, seed, runs=3)


def _curve(seed: int) -> Version:
    ends = independents(seed)
    return trained(curve, seed, endpoints=tuple(f"{ends.name}/{i}" for i in (0, 1)), bank=0)


def _snapshot(seed: int) -> Version:
    return trained(snapshot, seed, runs=3)


def _fge(seed: int) -> Version:
    return trained(fge, seed, runs=3)


def _csgmcmc(seed: int) -> Version:
    return trained(csgmcmc, seed, runs=3)


def _soup(seed: int) -> Version:
    return trained(soup, seed)


def _two_ends(seed: int) -> float:
    return spent(independents(seed)) * 2 / 3


ARMS = [
    *(Arm("independent", independents, slice(0, k), k / 3) for k in (1, 2, 3)),
    *(Arm("snapshot, 5 a run", _snapshot, slice(0, 5 * k), k / 3) for k in (1, 2, 3)),
    *(Arm("FGE, 6 a run", _fge, slice(0, 6 * k), k / 3) for k in (1, 2, 3)),
    Arm("curve: its two ends", _curve, slice(0, 6, 5), 0, _two_ends),
    Arm("curve: its middle alone", _curve, slice(2, 3), 1, _two_ends),
    Arm("curve: 6 points", _curve, slice(0, 6), 1, _two_ends),
]
# Methods that were added later are measured by themselves, so that what was measured before stays.
ADDED = [
    *(Arm("cSG-MCMC, 12 a run", _csgmcmc, slice(0, 12 * k), k / 3) for k in (1, 2, 3)),
    Arm("greedy soup of the last 5 epochs", _soup, slice(0, 1)),
]


def _measured(arms: list[Arm], stem: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    kept = Kept(RESULTS / f"{stem}.jsonl", {"common": COMMON, "arms": [arm.method for arm in arms]})
    return kept.measure(seeds, lambda seed: measure(arms, seed), stem)


def main() -> None:
    seeds = SEEDS[: int(sys.argv[sys.argv.index("--seeds") + 1])] if "--seeds" in sys.argv else SEEDS
    Store().check_writable("benchmark")
    found = [
        {"rows": [*first["rows"], *added["rows"]]}
        for first, added in zip(
            _measured(ARMS, "budgets", seeds), _measured(ADDED, "budgets_added", seeds), strict=True
        )
    ]
    text = ["# Ensembles at equal cost", "", (__doc__ or "").split("\n\n")[-1].strip(), ""]
    for kind, title in (("plain", "Without temperature"), ("fitted", "With a temperature fitted on validation")):
        text += [
            f"## {title}: test split, mean and standard deviation over seeds {list(seeds)}",
            "",
            table(found, kind),
            "",
        ]
    (RESULTS / "budgets.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
