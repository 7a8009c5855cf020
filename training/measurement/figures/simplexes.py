"""Simplexes and complexes (Benton et al. 2021, figures 3 to 6): faces, view in 3 dimensions, volume by dimension."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models_store.store import Version
from training import logger
from training.errors import ConfigError
from training.geometry import volume
from training.geometry.coefficients import Coordinates
from training.measurement.figures import plane
from training.measurement.probing import Kept, Subset, open_probe
from training.measurement.report import Report


def measure(version: Version, faces: list[list[int]], grid: int, margin: float, subset: Subset, folder: Path) -> Report:
    """Write face-A-B-C.{csv,json,png} for each face, complex.{json,png}, and volume.{csv,png}.

    Args:
        version: an ensemble that training.espro published.
        faces: three vertices each; empty: the first three of the first simplex.
        grid: number of points on each side of a face's plane.
        margin: how far the plane extends beyond the face, as a share of its extent.
        subset: number of images to measure on.
        folder: where the files are written.

    Returns:
        The content of complex.json, with all figures.

    Raises:
        ConfigError: a face names a vertex that does not exist.
    """
    geometry = version.manifest.geometry
    assert geometry is not None, "versions of training.espro have a geometry"
    faces = faces or [own[:3] for own in geometry.components if len(own) > 2][:1]
    if beyond := [vertex for face in faces for vertex in face if vertex >= len(geometry.vertices)]:
        raise ConfigError(
            f"{version.name} has {len(geometry.vertices)} vertices, counted from 0; --face names vertex {beyond[0]}."
        )
    files = [version.folder / file for file in geometry.vertices]
    folder.mkdir(parents=True, exist_ok=True)
    probe, found = open_probe(version, files, subset)
    growth = by_vertices(probe.positions, geometry.components)
    with (folder / "volume.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(growth[0]))
        writer.writeheader()
        writer.writerows(growth)

    question = {"files": version.manifest.files, "subset": dataclasses.asdict(subset)}
    kept = Kept(folder / "complex.jsonl", question)
    vertices = np.eye(len(files)).tolist()
    samples = [member.origin.coefficients for member in version.manifest.members if member.origin.coefficients]
    networks = len(vertices) + len(samples) + grid**2 * len(faces)
    logger.info(
        f"{networks} networks are measured; simplexes: {' '.join(','.join(map(str, own)) for own in geometry.components)}"
    )
    values = kept.measure([*vertices, *samples], lambda row: probe.at(np.array(row)).record(), "complex")
    positions = np.array([*vertices, *samples]) @ in_three_dimensions(probe.positions)
    report = Report(
        {
            "of": version.name,
            "measured_on": subset.describe(found),
            "vertices": len(vertices),
            "simplexes": geometry.components,
            "places": positions.tolist(),
            "train_loss": [value["train_loss"] for value in values],
            "test_error": [value["test_error"] for value in values],
            # JSON has no −∞: the log-volume of a flat complex is null.
            "volume": [{k: v if np.isfinite(v) else None for k, v in row.items()} for row in growth],
        }
    )
    (folder / "complex.json").write_text(json.dumps(report, allow_nan=False) + "\n")
    report.figures = {"volume": plot_volume(growth, version.name), "complex": plot_complex(report)}
    report.save_figures(folder)

    if not faces:
        logger.info(f"{version.name} has segments only: there are no faces to draw")
    for corners in faces:
        outline = np.eye(3)[[0, 1, 2, 0]]
        names = [f"{version.name}, vertex {corner}" for corner in corners]
        three, stem = [files[corner] for corner in corners], f"face-{'-'.join(map(str, corners))}"
        if not np.isfinite(volume.log_volume(probe.positions[corners])):
            logger.info(f"{stem} is flat: it is not drawn")
            continue
        report.figures |= plane.measure(names, version, three, outline, grid, margin, subset, folder, stem).figures
    return report


def by_vertices(positions: Coordinates, simplexes: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """Log-volume of the simplexes of the first k + 1 vertices of each, for k = 1, 2, …; −inf if all are flat.

    The floor is the log-volume if the last vertex of each had the largest height that counts as flat.
    """
    rows: list[dict[str, float]] = []
    floors: dict[tuple[int, ...], float] = {}  # log-volume of each simplex; its floor if it is flat
    for k in range(1, max(map(len, simplexes))):
        grown = sorted({tuple(sorted(own)[: k + 1]) for own in simplexes if len(own) > k})
        logs = volume.log_volumes(positions, grown)
        below: list[float] = []
        for own, log in zip(grown, logs.tolist(), strict=True):
            before = floors.get(own[:-1], 0.0)  # a single vertex has volume 1
            below.append(before + np.log(volume.lowest(positions[list(own)]) / k))
            floors[own] = log if np.isfinite(log) else below[-1]
        rows.append(
            {
                "dimension": k,
                "log_volume": float(np.logaddexp.reduce(logs)),
                "floor": float(np.logaddexp.reduce(below)),
            }
        )
    return rows


def in_three_dimensions(positions: Coordinates) -> NDArray[np.float64]:
    """The vertices along their three largest principal axes, (vertices, 3), in units of the weights."""
    left, lengths, _ = np.linalg.svd(positions - positions.mean(axis=0), full_matrices=False)
    found = np.zeros((len(positions), 3))
    found[:, : min(3, len(lengths))] = (left * lengths)[:, :3]
    return found


def plot_complex(report: dict[str, Any]) -> Figure:
    """The complex along its principal axes: vertices are crosses, drawn networks are dots, coloured by train loss."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes: Any = figure.add_subplot(projection="3d")
    positions, losses = np.array(report["places"]), np.array(report["train_loss"])
    count = report["vertices"]
    edges = {pair for own in report["simplexes"] for pair in itertools.combinations(sorted(own), 2)}
    for a, b in sorted(edges):
        axes.plot(*positions[[a, b]].T, color="0.6", linewidth=0.8)
    scale = {"vmin": losses.min(), "vmax": losses.max(), "cmap": "viridis_r"}
    axes.scatter(*positions[:count].T, c=losses[:count], marker="X", s=90, edgecolors="k", **scale)
    drawn = axes.scatter(*positions[count:].T, c=losses[count:], s=18, **scale)
    for vertex in range(count):
        axes.text(*positions[vertex], f" {vertex}")
    figure.colorbar(drawn, ax=axes, label="train loss (L2 included)", shrink=0.7)
    figure.suptitle(report["of"])
    return figure


def plot_volume(growth: list[dict[str, float]], title: str) -> Figure:
    """Log-volume by dimension, with the floor below which a height is rounding error. Crosses are flat complexes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    k, logs, floors = (np.array([row[name] for row in growth]) for name in ("dimension", "log_volume", "floor"))
    full = np.isfinite(logs)
    axes.plot(k[full], logs[full], "o-", label="log-volume (float64)")
    axes.plot(k, floors, "--", color="0.5", label=f"floor: a last height of {volume.FLAT:.1e} of the weights' norm")
    axes.plot(k[~full], floors[~full], "x", color="C3", label="flat: −∞")
    axes.set(xlabel="dimension (vertices beyond the first)", ylabel="log-volume", xticks=k)
    axes.legend()
    figure.suptitle(title)
    return figure
