"""Curves of low loss on Fashion-MNIST, with and without batch norm: ends, Bezier and polygonal chain with one bend, and the segment.

    python -m benchmarks.paths.curves             run the commands below, each where it left off, and keep results/curves.md and its figures
    python -m benchmarks.paths.curves --commands  print them

Ends are plain trainings with initial weights and data order of their own. 61 points a path; all test images; batch norm re-estimated at each point.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

RESULTS = Path(__file__).parents[1] / "results"
WORK = Path("evaluation/curves")
DATA = ["--dataset", "fashion-mnist"]
NETWORKS = {
    "preresnet8": [*DATA, "--network", "preresnet8"],
    "vgg16": [*DATA, "--network", "vgg16", "--network-options", "width=0.125", "dropout=0.0", "--lr", "0.02", "--weight-decay", "5e-4"],
}  # fmt: skip
ENDS = {"preresnet8": ["--epochs", "12"], "vgg16": ["--epochs", "15"]}
# The bend of a chain has up to twice the coefficient of a Bezier curve's: without batch norm it diverged at 0.03.
RATES = {"preresnet8": {"bezier": "0.1", "polychain": "0.1"}, "vgg16": {"bezier": "0.03", "polychain": "0.015"}}
CURVE_EPOCHS = "40"
SHAPES = ("bezier", "polychain")
MEASURE = ["--path", "--train-images", "10000", "--bn-images", "8192"]


def commands() -> list[list[str]]:
    """In order; every one goes on where it was killed, and finds itself finished."""
    found: list[list[str]] = []
    for network, options in NETWORKS.items():
        ends = f"fm-{network}-ends"
        found.append(["training.independent", *options, *ENDS[network], "--runs", "2", "--name", ends])
        for shape in SHAPES:
            name = f"fm-{network}-{shape}"
            training = ["--epochs", CURVE_EPOCHS, "--curve-lr", RATES[network][shape]]
            bank = [] if (network, shape) == ("preresnet8", "bezier") else ["--bank", "0"]
            found.append(
                ["training.curve", *options, *training, "--endpoints", f"{ends}/0", f"{ends}/1", "--shape", shape, *bank, "--name", name]
            )  # fmt: skip
            found.append(["training.evaluate", name, *MEASURE, "--output", str(WORK / name)])
    return found


def table() -> str:
    rows = []
    for network in NETWORKS:
        for shape in SHAPES:
            report = json.loads((WORK / f"fm-{network}-{shape}" / "path.json").read_text())
            for name, way in report["ways"].items():
                error = way["summary"]["test_error"]
                worse = max(error["start"], error["end"])
                rows.append(
                    [
                        network,
                        name if name == shape else f"{name} (beside {shape})",
                        f"{way['length_ratio']:.3f}",
                        *(f"{100 * error[key]:.2f}" for key in ("start", "end", "max", "mean_over_t", "mean_over_length")),
                        f"{100 * (error['max'] - worse):+.2f}",
                        f"{error['max'] / worse:.2f}",
                    ]
                )  # fmt: skip
    headers = [
        "network",
        "path",
        "length",
        "t = 0",
        "t = 1",
        "max",
        "over t (eq. 2)",
        "over length (eq. 1)",
        "max − worse end",
        "max / worse end",
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    lines = [" ".join(["python -m", *command]) for command in commands()]
    if "--commands" in sys.argv:
        print("\n".join(lines))
        return
    for command in commands():
        print("python -m", *command, flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)
    for network in NETWORKS:
        for shape in SHAPES:
            shutil.copyfile(WORK / f"fm-{network}-{shape}/path.png", RESULTS / f"curve-{network}-{shape}.png")
    text = ["# Curves on Fashion-MNIST: test error in %", "", table(), ""]
    text += [
        "Length is over the segment's. Figures: `curve-NETWORK-SHAPE.png`. The commands:",
        "",
        *(f"    {line}" for line in lines),
        "",
    ]
    (RESULTS / "curves.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
