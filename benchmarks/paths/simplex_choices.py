"""How many networks a step, which rate and which λ for a simplex? And SWAG's rate? The choices behind the methods' defaults, on validation images.

    python -m benchmarks.paths.simplex_choices      trains what is missing, prints and keeps results/simplex_choices.md

preresnet8 on 10 000 images of Fashion-MNIST, seed 100, which no other benchmark uses; a base of 30 epochs, and one further vertex that costs 30 more,
in whatever split between networks a step and epochs; 25 networks are averaged. SWAG: 30 epochs, 10 networks of one Gaussian. Scores are of the 6000 validation images, which
temperatures are fitted on, too: for choosing, not for claiming. The disagreement is on test images, whose labels it does not use.
"""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks.training.comparison import Arm, measure, table
from models_store.store import Store, Version
from training import espro, independent, swag
from training.measurement.probing import Kept

RESULTS = Path(__file__).parents[1] / "results"
SEED, B = 100, 30
COMMON = {"dataset": "fashion-mnist", "network": "preresnet8", "limit": 10_000, "epochs": B, "activate": False}
# (networks a step, rate, λ); the reach is √(λ · rate · iterations · 10).
CHOICES = [(1, 0.05, 0.1), (2, 0.05, 0.1), (5, 0.05, 0.1), (5, 0.1, 0.3), (5, 0.1, 1.0), (1, 0.05, 0.3), (1, 0.02, 0.1)]
SWAG_CHOICES = [(0.5, 0.01), (0.75, 0.01), (0.75, 0.03)]


def base(seed: int) -> Version:
    return independent.run(independent.Config(name="choices-base", seed=seed, runs=2, **COMMON))


def grown(points: int, rate: float, weight: float, seed: int) -> Version:
    name = f"choices-{points}-{rate:g}-{weight:g}".replace(".", "_")
    options = {"points_per_step": points, "vertex_lr": rate, "volume_weight": weight, "vertex_epochs": B // points}
    return espro.run(
        espro.Config(name=name, seed=seed, base=(f"{base(seed).name}/0",), vertices=1, bank=0, **options, **COMMON)
    )


def around(start: float, rate: float, seed: int) -> Version:
    name = f"choices-swag-{start:g}-{rate:g}".replace(".", "_")
    options = {"start": start, "swag_lr": rate, "every": 0.5, "samples": 10}
    return swag.run(swag.Config(name=name, seed=seed, runs=1, **options, **COMMON))


ARMS = [
    Arm("the base", base, slice(0, 1), 1 / 2),
    Arm("two independent networks", base, slice(None)),
    *(
        Arm(f"{n} a step, rate {rate:g}, λ {weight:g}", functools.partial(grown, n, rate, weight), slice(None), 1, lambda seed: float(B))
        for n, rate, weight in CHOICES
    ),
    *(
        Arm(f"SWAG from {start:g} B on, rate {rate:g}", functools.partial(around, start, rate), slice(None))
        for start, rate in SWAG_CHOICES
    ),
]  # fmt: skip


def main() -> None:
    Store().check_writable("benchmark")
    kept = Kept(RESULTS / "simplex_choices.jsonl", {"common": COMMON, "choices": CHOICES, "swag": SWAG_CHOICES})
    named = {arm.method: arm for arm in ARMS}
    found = kept.measure(list(named), lambda name: measure([named[name]], SEED), "arms")
    together = {"rows": [row for one in found for row in one["rows"]]}  # pyright: ignore[reportGeneralTypeIssues]
    text = ["# Choices for a simplex", "", (__doc__ or "").split("\n\n")[-1].strip(), ""]
    text += [table([together], "fitted", ("validation",)), ""]
    (RESULTS / "simplex_choices.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
