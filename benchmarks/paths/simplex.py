"""Is a simplex of low loss more than its base? Fashion-MNIST, one trained network, 3 further vertices; and a complex that joins 3 modes.

    python -m benchmarks.paths.simplex [--seeds N]      train what is missing (of the first N seeds), print and keep results/simplex.md

preresnet8 on all training images; 100 networks drawn from each simplex and each complex (batch norm re-estimated for each), measured on 10 000 training
images (simplexes only) and the test split. The recipes were chosen on seed 0, whose test images were looked at for that; the other seeds were not looked at
before, and averages are over them alone. `disagreement` is the share of test images that two networks label differently, the mean over all pairs. The base is also trained for as many
epochs as the simplex cost in passes. The simplex's average is that of its 25 published networks.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.training.budgets import COMMON, B, independents
from benchmarks.training.comparison import Arm, spent, table
from benchmarks.training.comparison import measure as compare
from models_store.store import Store, Version
from training import espro, independent
from training.geometry import coefficients, volume
from training.measurement.probing import Kept, Probe, Subset, open_probe

SEEDS = (0, 1, 2, 3)
CHOSEN_ON = 0
GROW = {"vertices": 3, "vertex_epochs": 10, "volume_weight": 0.6, "bank": 0}
JOIN = {
    "connect": ("0,3,4", "1,3,4", "2,3,4"),
    "vertex_epochs": 25,
    "vertex_lr": 0.1,
    "volume_weight": 0.005,
    "samples": 8,
    "bank": 0,
}
TRAIN_IMAGES = {"simplex": 10_000, "complex": 1}
DRAWN = 100
RESULTS = Path(__file__).parents[1] / "results"
WORK = Path("evaluation/simplex")
LINES = RESULTS / "simplex.jsonl"


def grown(seed: int) -> Version:
    base = (f"{independents(seed).name}/0",)
    return espro.run(espro.Config(name=f"simplex-grown-{seed}", seed=seed, base=base, **GROW, **COMMON))


def joined(seed: int) -> Version:
    base = (independents(seed).name,)
    return espro.run(espro.Config(name=f"simplex-joined-{seed}", seed=seed, base=base, **JOIN, **COMMON))


def plain(seed: int) -> Version:
    cost = B + GROW["vertices"] * GROW["vertex_epochs"]
    return independent.run(
        independent.Config(name=f"simplex-plain-{seed}", seed=seed, runs=1, **{**COMMON, "epochs": cost})
    )


def disagreement(networks: list[dict[str, Any]]) -> float:
    labels = np.array([[int(label) for label in one["labels"]] for one in networks])
    return float(np.mean([(labels[i] != labels[j]).mean() for i in range(len(labels)) for j in range(i)]))


def measure(seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": seed}
    for name, of in (("simplex", grown), ("complex", joined)):
        version = of(seed)
        geometry = version.manifest.geometry
        assert geometry is not None
        files = [version.folder / file for file in geometry.vertices]
        probe, _ = open_probe(version, files, Subset(train=TRAIN_IMAGES[name]))
        shares = volume.shares(probe.positions, geometry.components)
        drawn = coefficients.uniform_over(np.random.default_rng(seed), DRAWN, geometry.components, shares, len(files))
        kept = Kept(
            WORK / f"{name}-{seed}.jsonl", {"files": version.manifest.files, "train images": TRAIN_IMAGES[name]}
        )

        def at(row: list[float], probe: Probe = probe) -> dict[str, Any]:
            there = probe.at(np.array(row))
            labels = "".join(map(str, there.test_probs.argmax(1).tolist()))
            return {"train_accuracy": 1 - there.train_error, "test_error": there.test_error, "labels": labels}

        corners = kept.measure(np.eye(len(files)).tolist(), at, f"{name}, vertices")
        networks = kept.measure(drawn.tolist(), at, f"{name}, networks")
        pairs = sorted({pair for own in geometry.components for pair in itertools.combinations(own, 2)})
        found[name] = {
            "test_error": [one["test_error"] for one in networks],
            "corner_test_error": [one["test_error"] for one in corners],
            "disagreement": disagreement(networks),
            "edges": [coefficients.distances(probe.positions)[pair] for pair in pairs],
            "distance_from_zero": float(np.linalg.norm(probe.positions[0])),
            "log_volume": volume.log_complex(probe.positions, geometry.components),
        }
        if name == "simplex":
            found[name]["train_accuracy"] = [one["train_accuracy"] for one in networks]
            found[name]["corner_train_accuracy"] = [one["train_accuracy"] for one in corners]
        else:
            found["independent"] = disagreement(corners[:3])
        found[name]["cost"] = spent(version)
    return found | {"scores": compare(ARMS, seed)}


ARMS = [
    Arm("base", independents, slice(0, 1), 1 / 3),
    Arm("the simplex's average", grown, slice(None), 1, lambda seed: float(B)),
    Arm("plain training", plain, slice(None)),
    Arm("independent networks", independents, slice(None)),
]


def text_of(rows: list[dict[str, Any]]) -> str:
    one, three = [], []
    for row in rows:
        seed = f"{row['seed']}, chosen on" if row["seed"] == CHOSEN_ON else row["seed"]
        simplex, base = row["simplex"], row["simplex"]["corner_train_accuracy"][0]
        one.append(
            [
                seed,
                f"{100 * base:.2f}",
                f"{100 * min(simplex['train_accuracy']):.2f}",
                f"{100 * min(simplex['train_accuracy']) / base:.2f}",
                f"{100 * simplex['disagreement']:.2f}",
                f"{100 * row['independent']:.2f}",
                f"{simplex['disagreement'] / row['independent']:.2f}",
                f"{min(simplex['edges']):.2f} … {max(simplex['edges']):.2f}",
                f"{simplex['distance_from_zero']:.2f}",
                f"{simplex['cost']:g}",
            ]
        )
        joined, ends = row["complex"], row["complex"]["corner_test_error"][:3]
        three.append(
            [
                seed,
                " / ".join(f"{100 * e:.2f}" for e in ends),
                f"{100 * np.mean(joined['test_error']):.2f}",
                f"{100 * max(joined['test_error']):.2f}",
                f"{100 * (max(joined['test_error']) - np.mean(ends)):+.2f}",
                f"{100 * (max(joined['test_error']) - max(ends)):+.2f}",
                f"{100 * joined['disagreement']:.2f}",
                f"{min(joined['edges']):.2f} … {max(joined['edges']):.2f}",
                f"{joined['cost']:g}",
            ]
        )
    parts = {
        "100 networks of the simplex": (one, ["seed", "base, train accuracy %", "worst of 100", "% of the base's", "disagreement, %", "independent", "ratio", "edges", "base from zero", "cost beside the base, epochs"]),
        "100 networks of a complex that joins three modes: test error, %": (three, ["seed", "modes", "mean", "worst", "worst − mean of modes", "worst − worst mode", "disagreement", "edges", "cost beside the modes, epochs"]),
    }  # fmt: skip
    found = ["# A simplex around one network", "", (__doc__ or "").split("\n\n")[-1].strip(), ""]
    for title, (body, headers) in parts.items():
        found += [f"## {title}", "", tabulate(body, headers, tablefmt="github", disable_numparse=True), ""]
    averaged = [row for row in rows if row["seed"] != CHOSEN_ON] or rows
    scores, of = [row["scores"] for row in averaged], ", ".join(str(row["seed"]) for row in averaged)
    for kind, how in (("fitted", "with a temperature fitted on validation"), ("plain", "without temperature")):
        found += [
            f"## Averages, {how}: test split, mean and standard deviation over seeds {of}",
            "",
            table(scores, kind),
            "",
        ]
    return "\n".join(found)


def main() -> None:
    seeds = SEEDS[: int(sys.argv[sys.argv.index("--seeds") + 1])] if "--seeds" in sys.argv else SEEDS
    Store().check_writable("benchmark")
    kept = Kept(LINES, {"common": COMMON, "grow": GROW, "join": JOIN})
    text = text_of(kept.measure(seeds, measure, "seeds"))
    (RESULTS / "simplex.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
