"""Controls for curves: is it the curve that does it? 10 000 images of Fashion-MNIST, all test images.

    python -m benchmarks.paths.curve_controls      trains what is missing, then prints and keeps results/curve_controls.md

1. The trivial curve (supplement of Garipov et al. 2018): without batch norm, weights times s and the bias of layer i times sⁱ is a network with the same labels.
   A path through s = 0 joins any two networks, and ensembling along it gains nothing over its ends.
2. Two curves between the same ends, from two seeds: how far apart are their bends?
3. A straight step in a random direction instead of along the curve: does the pair (end, point) gain?
4. Length of the curve over the segment's, by width of the network.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate
from torch import nn

from models_store.store import Version
from training import curve, independent, networks
from training.geometry import coefficients
from training.geometry.vertices import State, coordinates
from training.measurement.probing import Probe, Subset, open_probe

RESULTS = Path(__file__).parents[1] / "results"
KEPT = RESULTS / "curve_controls.json"
COMMON = {"dataset": "fashion-mnist", "limit": 10_000, "activate": False}
PLAIN = {**COMMON, "network": "preresnet8"}
NO_NORM = {**COMMON, "network": "mlp", "lr": 0.05}
WIDTHS = (0.25, 0.5, 1.0, 2.0)
EPOCHS, CURVE_EPOCHS = 20, 40
SUBSET = Subset(train=2000, bn=4096)


def ends_and_curve(name: str, options: dict, seed: int = 0) -> tuple[Version, Version]:
    ends = independent.run(independent.Config(name=f"control-{name}-ends", epochs=EPOCHS, runs=2, **options))
    joined = curve.run(
        curve.Config(
            name=f"control-{name}-curve-{seed}", epochs=CURVE_EPOCHS, seed=seed, bank=0,
            endpoints=(f"{ends.name}/0", f"{ends.name}/1"), **options,
        )
    )  # fmt: skip
    return ends, joined


def vertices(version: Version) -> list[Path]:
    assert version.manifest.geometry is not None
    return [version.folder / file for file in version.manifest.geometry.vertices]


def scaled(state: State, network: nn.Module, s: float) -> State:
    """The trivial network: the label of every image stays."""
    found = dict(state)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for depth, name in enumerate(layers, 1):
        found[f"{name}.weight"] = state[f"{name}.weight"] * s
        found[f"{name}.bias"] = state[f"{name}.bias"] * s**depth
    return found


def trivial() -> str:
    _, joined = ends_and_curve("trivial", NO_NORM)
    files = vertices(joined)
    probe, data = open_probe(joined, files, SUBSET)
    network = networks.build("mlp", len(data.classes), data.shape, {})
    first, _, last = (load_file(file) for file in files)
    steps = (1.0, 0.8, 0.6)
    along = [scaled(first, network, s) for s in steps] + [scaled(last, network, s) for s in reversed(steps)]
    straight = Probe(network, data, along, 0.0, SUBSET, torch.device("cpu"))
    points = [straight.at(row) for row in np.eye(len(along))]
    curved = [probe.at(row) for row in coefficients.curve("bezier", np.linspace(0, 1, 6), 1)]
    rows = [
        ["the first end", *(f"{100 * probe.error_of_mean(one):.2f}" for one in (points[0], curved[0]))],
        ["3 points nearest to it", *(f"{100 * probe.error_of_mean(*ones[:3]):.2f}" for ones in (points, curved))],
        ["both ends", *(f"{100 * probe.error_of_mean(ones[0], ones[-1]):.2f}" for ones in (points, curved))],
        ["6 points", *(f"{100 * probe.error_of_mean(*ones):.2f}" for ones in (points, curved))],
    ]
    return tabulate(rows, ["test error, %; mlp", "trivial curve", "Bezier"], tablefmt="github", disable_numparse=True)


def two_seeds() -> str:
    _, one = ends_and_curve("plain", PLAIN, 1)
    _, two = ends_and_curve("plain", PLAIN, 2)
    first, bend_1, last = (load_file(file) for file in vertices(one))
    bend_2 = load_file(vertices(two)[1])
    network = networks.build("preresnet8", 10, (1, 28, 28), {})
    places = coordinates([first, last, bend_1, bend_2], [name for name, _ in network.named_parameters()])

    def apart(a: np.ndarray) -> float:
        return float(np.linalg.norm(a @ places))

    between = apart(np.array([1, -1, 0, 0]))
    rows = [
        ["the two bends", f"{apart(np.array([0, 0, 1, -1])) / between:.3f}"],
        ["bend 1 and the middle of the segment", f"{apart(np.array([-0.5, -0.5, 1, 0])) / between:.3f}"],
        ["bend 2 and the middle of the segment", f"{apart(np.array([-0.5, -0.5, 0, 1])) / between:.3f}"],
    ]
    return tabulate(rows, ["distance over that of the ends", ""], tablefmt="github", disable_numparse=True)


def random_direction() -> str:
    _, joined = ends_and_curve("plain", PLAIN, 1)
    files = vertices(joined)
    probe, data = open_probe(joined, files, SUBSET)
    start = load_file(files[0])
    network = networks.build("preresnet8", len(data.classes), data.shape, {})
    names = [name for name, _ in network.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(start[name].shape, generator=generator) for name in names}
    length = np.sqrt(sum(float(d.double().square().sum()) for d in direction.values()))
    away = {**start, **{name: start[name] + direction[name] / length for name in names}}
    line = Probe(network, data, [start, away], 0.0, SUBSET, torch.device("cpu"))
    t = np.linspace(0, 1, 11)
    rows_of = coefficients.curve("bezier", t, 1)
    end = probe.at(rows_of[0])
    rows = []
    for row in rows_of[:6]:
        step = row - rows_of[0]
        distance = float(np.linalg.norm(step @ probe.positions))
        curved, straight = probe.at(row), line.at(np.array([1 - distance, distance]))
        rows.append(
            [f"{distance:.2f}", *(f"{100 * v:.2f}" for v in (curved.test_error, probe.error_of_mean(end, curved), straight.test_error, probe.error_of_mean(end, straight)))]
        )  # fmt: skip
    headers = ["distance from the end", "on the curve", "pair with the end", "random direction", "pair with the end"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def widths() -> str:
    rows = []
    for width in WIDTHS:
        options = {**PLAIN, "network_options": (f"width={width}",)}
        _, joined = ends_and_curve(f"width-{width}", options)
        files = vertices(joined)
        probe, _ = open_probe(joined, files, SUBSET)
        t = np.linspace(0, 1, 61)
        points = coefficients.curve("bezier", t, 1)
        lengths = coefficients.chords(points, probe.positions)
        straight = coefficients.chords(points[[0, -1]], probe.positions)[0]
        errors = [probe.at(row).test_error for row in points[::10]]
        rows.append(
            [
                f"{width:g}",
                f"{lengths.sum() / straight:.3f}",
                *(f"{100 * v:.2f}" for v in (errors[0], errors[-1], max(errors))),
            ]
        )
    headers = ["width of preresnet8", "length over the segment's", "error at t = 0, %", "t = 1", "largest of 7 points"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


PARTS = {
    "The trivial curve": trivial,
    "Two curves between the same ends": two_seeds,
    "A random direction": random_direction,
    "Length by width": widths,
}


def main() -> None:
    kept: dict[str, str] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for title, part in PARTS.items():
        if title not in kept:
            kept[title] = part()
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    text = "\n\n".join(["# Controls for curves", *(f"## {title}\n\n{kept[title]}" for title in PARTS), ""])
    (RESULTS / "curve_controls.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
