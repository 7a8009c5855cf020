"""Two spirals: do networks of a simplex draw different borders, and is their average unsure where there is no data? (Benton et al. 2021, section 5.3)

    python -m benchmarks.paths.spirals      trains what is missing, prints and keeps results/spirals.md and spirals.png

An MLP on two spirals, 2000 steps for a network or a vertex: 1000 points of one and a half turns, where all networks agree, and 100 points of 780 degrees, as the paper has (each
ten times in an epoch). Four independent networks against 25 networks of a simplex of three further vertices around the first, which costs as much, without the volume term
(λ 0) and with it. Seeds 0, 1, 2. The picture is of 100 points, seed 0: above the base, three networks drawn from the simplex with λ 0.1, the average of its 25, and its
predictive entropy; below, the four independent networks, their average and its entropy.
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
from training import data, espro, independent
from training.config import data_options

RESULTS = Path(__file__).parents[1] / "results"
SEEDS = (0, 1, 2)
SETTINGS = {"1000 points, 1.5 turns": "many", "100 points, 780°": "few"}
LAMBDAS = (0.0, 0.1)
COMMON = {
    "network": "benchmarks.paths.spirals:network", "epochs": 200, "batch_size": 100, "lr": 0.05, "activate": False,
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


def many() -> Splits:
    """1000 points of one and a half turns, as images of two pixels in [0, 1]."""
    return Splits(_split(0, 1000, 3 * np.pi), _split(1, 400, 3 * np.pi), _split(2, 1000, 3 * np.pi))


def few() -> Splits:
    """100 points of 780 degrees, ten times each."""
    turns = np.deg2rad(780)
    points, labels = _split(0, 100, turns).tensors
    train = TensorDataset(points.repeat(10, 1, 1, 1), labels.repeat(10))
    return Splits(train, _split(1, 400, turns), _split(2, 1000, turns))


def _split(seed: int, count: int, turns: float) -> TensorDataset:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    angle = np.sqrt(rng.uniform(0.05, 1, count)) * turns
    turned = angle + np.pi * labels
    points = angle[:, None] * np.stack([np.cos(turned), np.sin(turned)], axis=1) / turns
    points = 0.5 + 0.35 * (points + rng.normal(scale=0.02, size=points.shape))
    images = torch.from_numpy(np.clip(points, 0, 1)).float().view(count, 1, 1, 2)
    return TensorDataset(images, torch.from_numpy(labels))


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


def networks(setting: str, seed: int) -> Version:
    """Four independent ones."""
    name = f"spirals-{setting}-{seed}"
    dataset = f"benchmarks.paths.spirals:{setting}"
    return independent.run(independent.Config(name=name, runs=4, seed=seed, dataset=dataset, **COMMON))


def simplex(setting: str, seed: int, weight: float) -> Version:
    """Around the first of them."""
    options = {"vertices": 3, "vertex_epochs": 200, "bank": 0, "volume_weight": weight, "seed": seed}
    name = f"spirals-{setting}-{seed}-{weight:g}".replace(".", "_")
    base = (f"{networks(setting, seed).name}/0",)
    dataset = f"benchmarks.paths.spirals:{setting}"
    return espro.run(espro.Config(name=name, base=base, dataset=dataset, **options, **COMMON))


def measured(version: Version, beside: float) -> tuple[float, float, float, float]:
    """Cost in epochs; disagreement of two networks, and entropy of the average, over the plane; test error of the average."""
    probs = over_the_plane(version)
    label = probs > 0.5
    apart = float(np.mean([(label[i] != label[j]).mean() for i in range(len(label)) for j in range(i)]))
    images, labels = data.as_arrays(data.load(data_options(version.manifest.provenance.config)).test)
    logits = EnsembleSession(version.folder, version.manifest).logits(images)
    wrong = float((softmax(logits).mean(0).argmax(1) != labels).mean())
    return spent(version) + beside, apart, float(entropy(probs.mean(0)).mean()), wrong


def main() -> None:
    rows = []
    for title, setting in SETTINGS.items():
        arms: dict[str, list[tuple[float, float, float, float]]] = {}
        for seed in SEEDS:
            modes = networks(setting, seed)
            arms.setdefault("4 independent networks", []).append(measured(modes, 0))
            for weight in LAMBDAS:
                grown = simplex(setting, seed, weight)
                arms.setdefault(f"25 of the simplex, λ {weight:g}", []).append(measured(grown, spent(modes) / 4))
        for name, found in arms.items():
            mean, spread = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
            cells = [
                f"{100 * mean[1]:.2f} ± {100 * spread[1]:.2f}",
                f"{mean[2]:.3f} ± {spread[2]:.3f}",
                f"{100 * mean[3]:.2f} ± {100 * spread[3]:.2f}",
            ]
            rows.append([title, name, f"{mean[0]:g}", *cells])
    heads = [
        "data",
        "networks",
        "cost, epochs",
        "disagreement over the plane, %",
        "entropy of the average over the plane, nats",
        "test error of the average, %",
    ]
    table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    text = f"# Two spirals\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n\nMean and standard deviation over the seeds.\n\n{table}\n"
    (RESULTS / "spirals.md").write_text(text)
    print(text)
    draw(over_the_plane(simplex("few", 0, 0.1)), over_the_plane(networks("few", 0))).savefig(
        RESULTS / "spirals.png", dpi=110
    )


def draw(grown: Floats, alone: Floats) -> Figure:
    """The picture that the module describes."""
    points, labels = few().train.tensors
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    axes = figure.subplots(2, 6)
    upper = [alone[0], *grown[:3], grown.mean(0), entropy(grown.mean(0))]
    lower = [*alone, alone.mean(0), entropy(alone.mean(0))]
    titles = ["base", "sample", "sample", "sample", "average of 25", "its entropy, nats"]
    for row, panels, names in (
        (0, upper, titles),
        (1, lower, ["network", "network", "network", "network", "average of 4", "its entropy, nats"]),
    ):
        for ax, panel, title in zip(axes[row], panels, names, strict=True):
            drawn = ax.imshow(
                panel,
                origin="lower",
                extent=(0, 1, 0, 1),
                cmap="viridis" if "entropy" in title else "coolwarm",
                vmin=0,
                vmax=np.log(2) if "entropy" in title else 1,
            )
            ax.scatter(*points.view(-1, 2).T, c=labels, s=4, cmap="gray")
            ax.set(title=title, xticks=[], yticks=[])
            figure.colorbar(drawn, ax=ax, shrink=0.6)
    return figure


if __name__ == "__main__":
    main()
