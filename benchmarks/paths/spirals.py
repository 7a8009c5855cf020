"""Two spirals: do networks of a simplex draw different borders, and is their average unsure where there is no data? (Benton et al. 2021, section 5.3)

    python -m benchmarks.paths.spirals      trains, prints, and writes results/spirals.png

An MLP on 1000 points of two spirals; left to right: the base, three networks drawn from a simplex around it, the average of 25, and its predictive
entropy; below, three independent networks, their average and its entropy.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.training.comparison import spent
from models_store.graphs.runtime import EnsembleSession
from models_store.store import Version
from models_store.uncertainty import Floats, softmax
from training import espro, independent

RESULTS = Path(__file__).parents[1] / "results"
COMMON = {
    "dataset": "benchmarks.paths.spirals:spirals", "network": "benchmarks.paths.spirals:network", "epochs": 200, "batch_size": 100, "lr": 0.05, "activate": False,
    "weight_decay": 0.0,
}  # fmt: skip
GRID = 60


class Splits(NamedTuple):
    """What a data factory gives."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...] = ("0", "1")
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)


def spirals() -> Splits:
    """Points in [0, 1]² as images of two pixels."""

    def split(seed: int, count: int) -> TensorDataset:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % 2
        angle = np.sqrt(rng.uniform(0.05, 1, count)) * 3 * np.pi
        turned = angle + np.pi * labels
        points = angle[:, None] * np.stack([np.cos(turned), np.sin(turned)], axis=1) / (3 * np.pi)
        points = 0.5 + 0.35 * (points + rng.normal(scale=0.02, size=points.shape))
        images = torch.from_numpy(np.clip(points, 0, 1)).float().view(count, 1, 1, 2)
        return TensorDataset(images, torch.from_numpy(labels))

    return Splits(split(0, 1000), split(1, 400), split(2, 1000))


def network(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Four hidden layers of 50 units."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = input_shape[2]
    for _ in range(4):
        layers += [nn.Linear(width, 50), nn.ReLU()]
        width = 50
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def over_the_plane(version: Version) -> Floats:
    """(members, GRID, GRID): each member's probability of class 1."""
    x, y = np.meshgrid(np.linspace(0, 1, GRID), np.linspace(0, 1, GRID))
    images = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32).reshape(-1, 1, 1, 2)
    # Without the temperature: all validation points are right here, so that it would only run to its bound.
    logits = EnsembleSession(version.folder, version.manifest).logits(images)
    return softmax(logits)[:, :, 1].reshape(-1, GRID, GRID)


def entropy(p: Floats) -> Floats:
    return -(p * np.log(np.maximum(p, 1e-12)) + (1 - p) * np.log(np.maximum(1 - p, 1e-12)))


def main() -> None:
    modes = independent.run(independent.Config(name="spirals-modes", runs=4, **COMMON))
    options = {"vertices": 3, "vertex_epochs": 200, "bank": 0}
    grown = espro.run(espro.Config(name="spirals-simplex", base=(f"{modes.name}/0",), **options, **COMMON))
    simplex, alone = over_the_plane(grown), over_the_plane(modes)
    points, labels = spirals().train.tensors
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    axes = figure.subplots(2, 6)
    upper = [alone[0], *simplex[:3], simplex.mean(0), entropy(simplex.mean(0))]
    lower = [*alone, alone.mean(0), entropy(alone.mean(0))]
    titles = ["base", "sample", "sample", "sample", "average of 25", "its entropy"]
    for row, panels, names in (
        (0, upper, titles),
        (1, lower, ["network", "network", "network", "network", "average of 4", "its entropy"]),
    ):
        for ax, panel, title in zip(axes[row], panels, names, strict=False):
            drawn = ax.imshow(
                panel,
                origin="lower",
                extent=(0, 1, 0, 1),
                cmap="viridis" if "entropy" in title else "coolwarm",
                vmin=0,
                vmax=np.log(2) if "entropy" in title else 1,
            )
            ax.scatter(*points.view(-1, 2).T, c=labels, s=1, cmap="gray")
            ax.set(title=title, xticks=[], yticks=[])
            figure.colorbar(drawn, ax=ax, shrink=0.6)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "spirals.png", dpi=110)
    rows = []
    costs = spent(modes), spent(grown) + spent(modes) / 4
    for name, probs, cost in zip(("4 independent networks", "25 of the simplex"), (alone, simplex), costs, strict=True):
        label = probs > 0.5
        pairs = [(label[i] != label[j]).mean() for i in range(len(label)) for j in range(i)]
        rows.append([name, cost, f"{np.mean(pairs):.3f}", f"{entropy(probs.mean(0)).mean():.3f}"])
    print(tabulate(rows, ["over the plane", "cost, epochs", "disagreement", "mean entropy, nats"], tablefmt="github"))


if __name__ == "__main__":
    main()
