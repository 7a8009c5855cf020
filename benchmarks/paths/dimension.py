"""How many connecting vertices until the volume collapses? Two modes joined through k shared vertices (Benton et al. 2021, section 4.3).

    python -m benchmarks.paths.dimension      trains what is missing, prints and keeps results/dimension.md and dimension.png

preresnet8 on 10 000 images of Fashion-MNIST; two networks of 20 epochs; 10 connecting vertices, one after the other, 10 epochs each.
For each k the complex of the first k: its log-volume in float64; the floor, what it would be if the last vertex stood on the others but for float32's
rounding; that vertex's height over the others of its simplex, the lower one, and what it would rise to if no loss held it back (--volume-weight's help); its
distance from the nearest vertex of all; test error and train accuracy of 30 networks drawn from it. Collapsed is a complex whose newest vertex rises to less than a
tenth of that, or of which a drawn network errs in over 1.5 points more than the modes do.
Cost in plain epochs, the modes included.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from tabulate import tabulate

from benchmarks.training.comparison import spent
from training import espro, independent
from training.geometry import coefficients, volume
from training.measurement.figures.simplexes import by_vertices, plot_volume
from training.measurement.probing import Kept, Subset, open_probe
from training.optimisation.loop import iterations_per_epoch

RESULTS = Path(__file__).parents[1] / "results"
WORK = Path("evaluation/dimension")
COMMON = {"dataset": "fashion-mnist", "network": "preresnet8", "limit": 10_000, "activate": False}
CONNECTORS, DRAWN, VERTEX_EPOCHS = 10, 30, 10
LOW, WORSE = 0.1, 0.015


def main() -> None:
    modes = independent.run(independent.Config(name="dimension-modes", epochs=20, runs=2, **COMMON))
    shared = ",".join(str(2 + i) for i in range(CONNECTORS))
    options = {"connect": (f"0,{shared}", f"1,{shared}"), "vertex_epochs": VERTEX_EPOCHS, "samples": 1, "bank": 0}
    config = espro.Config(name="dimension", base=(modes.name,), **options, **COMMON)
    version = espro.run(config)
    geometry = version.manifest.geometry
    assert geometry is not None
    files = [version.folder / file for file in geometry.vertices]
    probe, splits = open_probe(version, files, Subset(train=2000, bn=2048))
    steps = iterations_per_epoch(splits, config.batch_size)
    kept = Kept(WORK / "drawn.jsonl", {"files": version.manifest.files})
    growth = by_vertices(probe.positions, geometry.components)
    WORK.mkdir(parents=True, exist_ok=True)
    plot_volume(growth, "two modes of preresnet8, joined through k vertices").savefig(WORK / "volume.png", dpi=150)
    ends = kept.measure(np.eye(len(files))[:2].tolist(), lambda at: probe.at(np.array(at)).record(), "modes")
    allowed = float(np.mean([one["test_error"] for one in ends])) + WORSE
    rows, low, high = [], [], []
    for k, row in enumerate(growth, 1):
        grown = [own[: k + 1] for own in geometry.components]
        generator, shares = np.random.default_rng(k), volume.shares(probe.positions, grown)
        drawn = coefficients.uniform_over(generator, DRAWN, grown, shares, len(files))
        found = kept.measure(drawn.tolist(), lambda at: probe.at(np.array(at)).record(), f"{k} connectors")
        newest = grown[0][-1]
        height = min(volume.heights(probe.positions[own])[-1] for own in grown)
        nearest = coefficients.distances(probe.positions)[newest, :newest].min()
        errors = [one["test_error"] for one in found]
        weight = config.volume_weight * 6 / ((k + 1) * (k + 2))
        free = np.sqrt(weight * config.vertex_lr * VERTEX_EPOCHS * steps / (1 - config.momentum))
        low += [k] if height < LOW * free else []
        high += [k] if max(errors) > allowed else []
        rows.append(
            [
                k,
                f"{spent(modes) + k * VERTEX_EPOCHS:g}",
                f"{row['log_volume']:.2f}",
                f"{row['floor']:.2f}",
                f"{height:.3f}",
                f"{free:.3f}",
                f"{nearest:.3f}",
                f"{100 * np.mean(errors):.2f}",
                f"{100 * max(errors):.2f}",
                f"{100 * min(1 - one['train_error'] for one in found):.2f}",
            ]
        )
    headers = [
        "k",
        "cost",
        "log-volume",
        "floor",
        "height",
        "with no loss",
        "nearest",
        "test error, %: mean",
        "worst",
        "train accuracy: worst",
    ]
    largest = max(growth, key=lambda row: row["log_volume"])
    said = [
        f"{what}: at k = {', '.join(map(str, where))}." if where else f"{what}: not up to k = {CONNECTORS}."
        for what, where in (
            ("A vertex that rises no more", low),
            (f"A network that errs in over {100 * allowed:.2f} %", high),
        )
    ]
    text = ["# Connecting vertices and volume", "", (__doc__ or "").split("\n\n")[-1].strip(), ""]
    text += [tabulate(rows, headers, tablefmt="github", disable_numparse=True), ""]
    text += [f"{' '.join(said)} The volume is largest at k = {largest['dimension']:g}.", ""]
    (RESULTS / "dimension.md").write_text("\n".join(text))
    shutil.copyfile(WORK / "volume.png", RESULTS / "dimension.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
