"""ESPRO against deep ensembles, SWAG and MultiSWAG: by number of components, and at equal cost, clean and corrupted.

    python -m benchmarks.paths.simplex_ensembles [--seeds N]     train what is missing (of the first N seeds), print and keep results/simplex_ensembles.md
    python -m benchmarks.paths.simplex_ensembles --large         all images, VGG-16 with batch norm, 60 epochs: for a GPU

preresnet8 on 10 000 images of Fashion-MNIST, B = 30 epochs, every other option as the methods have it, seeds 0, 1, 2. A component is a network, a simplex of one
further vertex (another B), or a Gaussian. Of each simplex 25 networks are averaged, of each Gaussian 10, over the weights of every half epoch of the last
quarter. Each ensemble has a temperature fitted on validation. Corruptions: the first 1000 test images, see training/measurement/corruptions.py.

All of it was fixed beforehand, but for the networks of 2B each, which were thought of when the others had been measured. The methods' defaults were chosen on another seed but on
the same 10 000 training images and the same validation images: a simplex's among seven, SWAG's among three (benchmarks/paths/simplex_choices.py); for plain training nothing was chosen.

Cost is in forward and backward passes, in epochs. Not in it: batch norm is re-estimated for every network on 8192 images, 0.82 epochs of forward passes (75
networks: as much as about 20 epochs, where forward is a third of both).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training.comparison import Arm, Labelled, measure, spent, table
from models_store.store import Store, Version
from training import espro, independent, swag
from training.measurement import corruptions
from training.measurement.corruptions import LEFT_OUT, SEVERITIES
from training.measurement.probing import Kept

SEEDS = (0, 1, 2)
CORRUPTED = 1000  # test images
SIMPLEX: dict[str, Any] = {"vertices": 1, "samples": 25, "bank": 0}
GAUSSIAN: dict[str, Any] = {"runs": 6, "every": 0.5, "samples": 10}
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Size:
    """What is trained, and on how much."""

    label: str
    epochs: int  # B
    options: dict[str, Any]

    @property
    def common(self) -> dict[str, Any]:
        """Options of all methods."""
        return {"dataset": "fashion-mnist", "epochs": self.epochs, "activate": False, **self.options}

    def networks(self, seed: int) -> Version:
        """Six, each for a budget."""
        return independent.run(
            independent.Config(name=f"{self.label}-networks-{seed}", seed=seed, runs=6, **self.common)
        )

    def longer(self, seed: int) -> Version:
        """Three, each for two budgets: what a network and its simplex cost together."""
        options = {**self.common, "epochs": 2 * self.epochs}
        return independent.run(independent.Config(name=f"{self.label}-longer-{seed}", seed=seed, runs=3, **options))

    def grown(self, seed: int) -> Version:
        """A simplex at each of the first three."""
        base = tuple(f"{self.networks(seed).name}/{i}" for i in range(3))
        options = {"vertex_epochs": self.epochs, **SIMPLEX, **self.common}
        return espro.run(espro.Config(name=f"{self.label}-espro-{seed}", seed=seed, base=base, **options))

    def gaussians(self, seed: int) -> Version:
        """Six, each over a run of its own."""
        return swag.run(swag.Config(name=f"{self.label}-swag-{seed}", seed=seed, **GAUSSIAN, **self.common))

    def arms(self) -> list[Arm]:
        """The first nine are 1, 2, 3 components of each kind."""

        def networks(k: int) -> Arm:
            return Arm("deep ensemble", self.networks, slice(0, k), k / 6)

        def simplexes(k: int) -> Arm:
            bases = lambda seed: spent(self.networks(seed)) * k / 6  # noqa: E731
            return Arm("ESPRO", self.grown, slice(0, SIMPLEX["samples"] * k), k / 3, bases)

        def gaussians(k: int) -> Arm:
            return Arm("SWAG" if k == 1 else "MultiSWAG", self.gaussians, slice(0, GAUSSIAN["samples"] * k), k / 6)

        compared = [arm for k in (1, 2, 3) for arm in (networks(k), simplexes(k), gaussians(k))]
        return [*compared, *(kind(k) for kind in (networks, gaussians) for k in (4, 6))]

    def rivals(self) -> list[Arm]:
        """Fewer networks that are trained for longer, at 2, 4 and 6 budgets."""
        return [Arm("deep ensemble, 2B each", self.longer, slice(0, k), k / 3) for k in (1, 2, 3)]


SMALL = Size("simplexes", 30, {"network": "preresnet8", "limit": 10_000})
LARGE = Size("simplexes-large", 60, {"network": "vgg16-bn", "lr": 0.05, "weight_decay": 5e-4})


def corrupted(test: Labelled) -> dict[str, Labelled]:
    """The corrupted test sets by KIND-SEVERITY."""
    sets = corruptions.corrupted(test[0][:CORRUPTED])
    return {f"{kind}-{severity}": (images.astype(np.float64), test[1][:CORRUPTED]) for kind, severity, images in sets}


def _of_several(cost: float, budget: int) -> bool:
    return any(abs(cost / budget - several) < 0.1 for several in (2, 4, 6))


def main() -> None:
    size = LARGE if "--large" in sys.argv else SMALL
    seeds = SEEDS[: int(sys.argv[sys.argv.index("--seeds") + 1])] if "--seeds" in sys.argv else SEEDS
    Store().check_writable("benchmark")
    stem = "simplex_ensembles" + ("_large" if size is LARGE else "")
    recipe = {"size": dataclasses.asdict(size), "simplex": SIMPLEX, "gaussian": GAUSSIAN, "left out": LEFT_OUT}
    kept = Kept(RESULTS / f"{stem}.jsonl", recipe)
    found = kept.measure(seeds, lambda seed: measure(size.arms(), seed, corrupted), "seeds")
    # In a file of their own: they were thought of when the others had been measured.
    more = Kept(RESULTS / f"{stem}_longer.jsonl", recipe)
    rivals = more.measure(seeds, lambda seed: measure(size.rivals(), seed, corrupted), "seeds, longer")
    found = [{"rows": one["rows"] + its["rows"]} for one, its in zip(found, rivals, strict=True)]
    shifted = [name for name in found[0]["rows"][0]["plain"] if name not in ("test", "validation")]  # pyright: ignore[reportIndexIssue]
    by_components = [{"rows": one["rows"][:9]} for one in found]  # pyright: ignore[reportIndexIssue]
    by_cost = [{"rows": sorted(one["rows"], key=lambda row: row["cost"])} for one in found]  # pyright: ignore[reportCallIssue, reportIndexIssue]
    equal = [{"rows": [row for row in one["rows"] if _of_several(row["cost"], size.epochs)]} for one in by_cost]
    counts = {len(one["rows"]) for one in equal}
    assert counts == {12}, f"2, 4 and 6 budgets of four kinds; found {counts}"
    text = ["# ESPRO, deep ensembles, SWAG", "", "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip(), ""]
    text += [
        f"Trained were {size}. Mean and standard deviation over seeds {list(seeds)}. Left out of the corruptions: {', '.join(LEFT_OUT)}.",
        "",
    ]
    for of, title in ((by_components, "1, 2, 3 components"), (equal, "Equal cost")):
        for kind, how in (("fitted", "with a fitted temperature"), ("plain", "without temperature")):
            text += [f"## {title}, {how}: test", "", table(of, kind), ""]
        text += [f"## {title}, with the temperature of clean validation: mean over all corruptions", ""]
        text += [table(of, "fitted", shifted), ""]
    for severity in SEVERITIES:
        own = [name for name in shifted if name.endswith(f"-{severity}")]
        text += [f"## Severity {severity}, equal cost, fitted", "", table(equal, "fitted", own), ""]
    (RESULTS / f"{stem}.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
