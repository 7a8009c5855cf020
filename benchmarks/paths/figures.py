"""The figure of README.md and docs/index.md: test error along a trained curve and along the straight segment between its ends.

    python -m benchmarks.paths.figures            draw docs/images/curve.png from benchmarks/results/figure_curve.json
    python -m benchmarks.paths.figures --train    train and measure first, on digits: minutes on a CPU; the commands resume

Two independent networks, a Bezier curve with one bend, 61 points of either path, all test images; batch norm re-estimated at each point.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
NUMBERS = ROOT / "benchmarks" / "results" / "figure_curve.json"
IMAGE = ROOT / "docs" / "images" / "curve.png"
WORK = Path("evaluation/figure-curve")
COMMANDS = (
    "training.independent --dataset digits --network preresnet8 --epochs 40 --runs 2 --name digits-ends",
    "training.curve --dataset digits --network preresnet8 --epochs 80 --curve-lr 0.1 --endpoints digits-ends/0 digits-ends/1 --bank 0 "
    "--name digits-curve",
    f"training.evaluate digits-curve --path --output {WORK}",
)


def measure() -> None:
    """Run the commands and keep the numbers of the figure."""
    for command in COMMANDS:
        print("python -m", command, flush=True)
        subprocess.run([sys.executable, "-m", *command.split()], check=True)
    report = json.loads((WORK / "path.json").read_text())
    errors = {name: [round(100 * e, 3) for e in way["series"]["test_error"]] for name, way in report["ways"].items()}
    kept = {
        "commands": [f"python -m {command}" for command in COMMANDS],
        "measured_on": report["measured_on"],
        "t": [round(t, 4) for t in report["t"]],
        "test_error_percent": errors,
    }
    NUMBERS.write_text(json.dumps(kept, indent=1) + "\n")


def draw() -> None:
    """A plot that is legible at a width of 700 pixels."""
    numbers = json.loads(NUMBERS.read_text())
    t, errors = numbers["t"], numbers["test_error_percent"]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(t, errors["segment"], "--", color="#b3541e", linewidth=2.5)
    axes.plot(t, errors["bezier"], "-", color="#1f5a99", linewidth=2.5)
    axes.annotate(
        f"straight segment:\nup to {max(errors['segment']):.1f} %", (0.6, 74), color="#b3541e", fontsize=13, va="top",
    )  # fmt: skip
    axes.annotate(
        f"trained Bezier curve:\nat most {max(errors['bezier']):.1f} %", (0.475, 4), ha="center", color="#1f5a99", fontsize=13
    )  # fmt: skip
    for end, position in ((0, "left"), (-1, "right")):
        axes.plot(t[end], errors["bezier"][end], "o", color="black", markersize=8, clip_on=False, zorder=3)
        axes.annotate(
            f"network {'A' if end == 0 else 'B'}", (t[end], errors["bezier"][end]), (6 if end == 0 else -6, 8),
            textcoords="offset points", ha=position, fontsize=12,
        )  # fmt: skip
    axes.set_xlabel("position t along the path from network A to network B", fontsize=12)
    axes.set_ylabel("test error, %", fontsize=12)
    axes.set(xlim=(0, 1), ylim=(-4, 90), yticks=[0, 20, 40, 60, 80])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train", action="store_true", help="train and measure before drawing")
    if parser.parse_args().train:
        measure()
    draw()
    print(IMAGE)


if __name__ == "__main__":
    main()
