"""ESPRO against deep ensembles, SWAG and MultiSWAG: by number of components, and at equal cost, clean and corrupted.

    python -m benchmarks.simplex_ensembles [--seeds N]     train what is missing (of the first N seeds), print and keep results/simplex_ensembles.md

On a GPU, with all images and VGG-16: set COMMON to {"dataset": "fashion-mnist", "network": "vgg16", "lr": 0.05, "weight_decay": 5e-4, …}.

Fixed beforehand: preresnet8 on 10 000 images of Fashion-MNIST, B = 30 epochs at rate 0.1, weight decay 3e-4, the data set's own augmentation,
seeds 0, 1, 2. A component is a network, a simplex of one further vertex (another B), or a Gaussian. Of each
simplex 25 networks are averaged, of each Gaussian 10. Cost is in forward and backward passes, in units of B. Batch norm is re-estimated for every
network, and each ensemble has a temperature fitted on validation. Corruptions: see benchmarks/corruptions.py.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from benchmarks.comparison import Arm, measure, spent, table
from benchmarks.corruptions import LEFT_OUT, SEVERITIES, corrupted
from models_store.store import Store, Version
from training import espro, independent, swag
from training.probing import Kept

SEEDS = (0, 1, 2)
B = 30
COMMON = {"dataset": "fashion-mnist", "network": "preresnet8", "limit": 10_000, "epochs": B, "activate": False}
SAMPLES, DRAWN = 25, 10
RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "simplex_ensembles.jsonl"


def _networks(seed: int) -> Version:
    return independent.run(independent.Config(name=f"simplexes-networks-{seed}", seed=seed, runs=6, **COMMON))


def _simplexes(seed: int) -> Version:
    modes = _networks(seed).name
    options = {"vertices": 1, "vertex_epochs": B, "samples": SAMPLES, "bank": 0}
    base = tuple(f"{modes}/{i}" for i in range(3))
    return espro.run(espro.Config(name=f"simplexes-espro-{seed}", seed=seed, base=base, **options, **COMMON))


def _gaussians(seed: int) -> Version:
    return swag.run(swag.Config(name=f"simplexes-swag-{seed}", seed=seed, runs=6, samples=DRAWN, **COMMON))


def _networks_of(k: int, seed: int) -> float:
    return spent(_networks(seed)) * k / 6


NETWORKS = [Arm("deep ensemble", _networks, slice(0, k), k / 6) for k in (1, 2, 3, 4, 6)]
SIMPLEXES = [
    Arm("ESPRO", _simplexes, slice(0, SAMPLES * k), k / 3, functools.partial(_networks_of, k)) for k in (1, 2, 3)
]
GAUSSIANS = [Arm("SWAG" if k == 1 else "MultiSWAG", _gaussians, slice(0, DRAWN * k), k / 6) for k in (1, 2, 3, 4, 6)]
ARMS = [*(arm for k in range(3) for arm in (NETWORKS[k], SIMPLEXES[k], GAUSSIANS[k])), *NETWORKS[3:], *GAUSSIANS[3:]]


def main() -> None:
    seeds = SEEDS[: int(sys.argv[sys.argv.index("--seeds") + 1])] if "--seeds" in sys.argv else SEEDS
    Store().check_writable()
    kept = Kept(LINES, {"about": __doc__, "common": COMMON, "left out": LEFT_OUT})
    found = kept.measure(seeds, lambda seed: measure(ARMS, seed, corrupted), "seeds")
    shifted = [name for name in found[0]["rows"][0]["plain"] if name not in ("test", "validation")]
    # The first nine arms are 1, 2 and 3 components of each kind.
    by_components = [{"rows": one["rows"][:9]} for one in found]
    by_cost = [{"rows": sorted(one["rows"], key=lambda row: row["cost"])} for one in found]
    several = {2.0 * B, 4.0 * B, 6.0 * B}
    equal = [{"rows": [row for row in one["rows"] if row["cost"] in several]} for one in by_cost]
    text = ["# ESPRO, deep ensembles, SWAG", "", (__doc__ or "").split("\n\n")[-1].strip(), ""]
    text += [
        f"Mean and standard deviation over seeds {list(seeds)}. Left out of the corruptions: {', '.join(LEFT_OUT)}.",
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
    (RESULTS / "simplex_ensembles.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
