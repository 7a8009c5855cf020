"""Train loss and test error over the plane through three weight sets (Garipov et al. 2018, figure 1)."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models_store.store import Version
from training.errors import ConfigError
from training.geometry import volume
from training.geometry.coefficients import Coefficients, Coordinates
from training.measurement.probing import Kept, Subset, open_probe
from training.measurement.report import Report


@dataclass(frozen=True)
class Plane:
    """The plane through three weight sets, with the coordinates of the paper (footnote 1), in units of the weights."""

    corners: NDArray[np.float64]  # (3, 2)

    @classmethod
    def through(cls, positions: Coordinates) -> Plane:
        """The plane through three weight sets with these coordinates, (3, axes).

        Raises:
            ConfigError: they lie on one line.
        """
        first, second = positions[1] - positions[0], positions[2] - positions[0]
        length = float(np.linalg.norm(first))
        along = float(second @ first) / length if length > 0 else 0.0
        across = float(np.linalg.norm(second - along * first / length)) if length > 0 else 0.0
        if not across > volume.lowest(positions):
            raise ConfigError("The three networks lie on one line, so there is no plane through them.")
        return cls(np.array([[0, 0], [length, 0], [along, across]]))

    def coefficients(self, positions: NDArray[np.float64]) -> Coefficients:
        """Coefficients of points (N, 2) of the plane over the three weight sets: (N, 3); rows sum to 1."""
        third = positions[:, 1] / self.corners[2, 1]
        second = (positions[:, 0] - third * self.corners[2, 0]) / self.corners[1, 0]
        return np.stack([1 - second - third, second, third], axis=1)

    def axes(self, grid: int, margin: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The x and y values of a grid that covers the three weight sets and a margin."""
        low, high = self.corners.min(axis=0), self.corners.max(axis=0)
        room = margin * (high - low)
        x, y = (np.linspace(low[i] - room[i], high[i] + room[i], grid) for i in range(2))
        return x, y


def measure(
    of: list[str], version: Version, files: list[Path], path: Coefficients | None, grid: int, margin: float,
    subset: Subset, folder: Path, stem: str = "plane",
) -> Report:  # fmt: skip
    """Measure on a grid, and write STEM.csv, STEM.json and STEM.png into `folder`. Returns the content of the JSON.

    Args:
        of: names of the three networks, or of their ensemble.
        version: its manifest records the data set and the network.
        files: the three weight sets.
        path: coefficients of points over the three, drawn as a line; None: no line.
        grid: number of points on each side.
        margin: how far the plane extends beyond the three, as a share of their extent.
        subset: number of images to measure on.
        folder: where the files are written, and intermediate results, with which an interrupted measurement resumes.
        stem: stem of the file names.

    Raises:
        ConfigError: the three lie on one line.
    """
    probe, found = open_probe(version, files, subset)
    flat = Plane.through(probe.positions)
    x, y = flat.axes(grid, margin)
    positions = np.stack([axis.ravel() for axis in np.meshgrid(x, y)], axis=1)
    question = {"of": of, "files": version.manifest.files, "subset": dataclasses.asdict(subset)}
    kept = Kept(folder / f"{stem}.jsonl", question)
    rows = flat.coefficients(positions)
    values = kept.measure(rows.tolist(), lambda row: probe.at(np.array(row)).record(), stem)
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "c1", "c2", "c3", *values[0]])
        writer.writerows(
            [*place, *row, *value.values()] for place, row, value in zip(positions, rows, values, strict=True)
        )
    report = Report(
        {
            "of": of,
            "measured_on": subset.describe(found),
            "x": x.tolist(),
            "y": y.tolist(),
            "corners": flat.corners.tolist(),
            "path": (path @ flat.corners).tolist() if path is not None else None,
            **{
                name: np.array([value[name] for value in values]).reshape(len(y), len(x)).tolist()
                for name in ("train_loss", "test_error")
            },
        }
    )
    (folder / f"{stem}.json").write_text(json.dumps(report) + "\n")
    report.figures[stem] = plot(report)
    report.save_figures(folder)
    return report


def plot(report: dict[str, Any]) -> Figure:
    """Contours of train loss and test error. Crosses are the three networks, numbered as given; a line is the path."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    x, y, corners = (np.array(report[name]) for name in ("x", "y", "corners"))
    # Distances keep their proportions, unless the figure would be a sliver.
    extents = np.ptp(x), np.ptp(y)
    aspect = "equal" if max(extents) < 3 * min(extents) else "auto"
    panels: list[Axes] = list(figure.subplots(1, 2))
    for axes, (name, label, scale) in zip(
        panels,
        [("train_loss", "train loss (L2 included)", 1), ("test_error", "test error, %", 100)],
        strict=True,
    ):
        values = np.array(report[name]) * scale
        # Levels close together where the valley is, as the paper draws them.
        levels = values.min() + (values.max() - values.min()) * np.linspace(0, 1, 16) ** 2.5
        drawn = axes.contourf(x, y, values, levels=np.unique(levels), cmap="viridis_r")
        figure.colorbar(drawn, ax=axes, format="%.3g")
        if report["path"] is not None:
            axes.plot(*np.array(report["path"]).T, "k--", linewidth=1, label="path")
        axes.plot(*corners.T, "kX", markersize=9, linestyle="none", label="networks")
        for number, corner in enumerate(corners, 1):
            axes.annotate(str(number), corner, (7, 7), textcoords="offset points", fontsize=11, weight="bold")
        axes.set(title=label, aspect=aspect, xlabel="distance (L2 of weights)", ylabel="distance (L2 of weights)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    names = report["of"] if len(report["of"]) == 3 else None
    figure.suptitle(", ".join(f"{i}: {name}" for i, name in enumerate(names, 1)) if names else report["of"][0])
    return figure
