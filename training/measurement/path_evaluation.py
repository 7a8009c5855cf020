"""Measures a published curve and the segment between its ends, by points (Garipov et al. 2018, table 2, figure 2)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from models_store.store import Version
from training import logger
from training.errors import ConfigError
from training.geometry import coefficients
from training.geometry.coefficients import Coefficients
from training.measurement.probing import Kept, Measured, Subset, open_probe
from training.measurement.report import Report

SHAPES = ("segment", "polychain", "bezier")
COLUMNS = ("train_loss", "train_error", "test_error", "test_nll", "test_nll_fitted", "pair_error")


def evaluate(version: Version, points: int, component: int, subset: Subset, folder: Path) -> Report:
    """Measure, print and write path.md, path.json and path.png into `folder`; returns the content of path.json.

    Raises:
        ConfigError: the version is not a curve, or does not have this component.
    """
    geometry = version.manifest.geometry
    if geometry is None or geometry.shape not in SHAPES:
        raise ConfigError(
            f"{version.name} is not a curve (it was made by {version.manifest.method}); train one with python -m training.curve."
        )
    if not 0 <= component < len(geometry.components):
        raise ConfigError(
            f"{version.name} has {len(geometry.components)} curves, counted from 0; got --component {component}."
        )
    files = [version.folder / geometry.vertices[index] for index in geometry.components[component]]
    probe, data = open_probe(version, files, subset)
    question = {"files": version.manifest.files, "component": component, "subset": dataclasses.asdict(subset)}
    kept = Kept(folder / "path.jsonl", question)
    t = np.linspace(0, 1, points)
    bends = len(files) - 2
    ways: dict[str, Coefficients] = {geometry.shape: coefficients.curve(geometry.shape, t, bends)}  # pyright: ignore[reportArgumentType]
    straight = coefficients.over_all(coefficients.curve("segment", t, 0), (0, len(files) - 1), len(files))
    ways["segment"] = straight
    start: list[Measured] = []

    def ask(row: list[float]) -> dict[str, float]:
        if not start:
            start.append(probe.at(ways["segment"][0]))
        found = probe.at(np.array(row))
        return {**found.record(), "pair_error": probe.error_of_mean(start[0], found)}

    report = Report(
        {
            "ensemble": version.name,
            "points": points,
            "component": component,
            "measured_on": subset.describe(data),
            "t": t.tolist(),
            "ways": {},
        }
    )
    distance = coefficients.chords(straight[[0, -1]], probe.positions)[0]
    for name, rows in ways.items():
        values = kept.measure(rows.tolist(), ask, name)
        lengths = coefficients.chords(rows, probe.positions)
        series = {column: np.array([value[column] for value in values]) for column in values[0]}
        report["ways"][name] = {
            "length_ratio": float(lengths.sum() / distance) if distance else None,
            "series": {column: line.tolist() for column, line in series.items()},
            "summary": {column: _summary(t, lengths, line) for column, line in series.items()},
        }
    folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(report)
    (folder / "path.md").write_text(text)
    (folder / "path.json").write_text(json.dumps(report, indent=2) + "\n")
    report.figures["path"] = plot(report)
    report.save_figures(folder)
    logger.info(text)
    logger.info(f"written to {folder}")
    return report


def _summary(t: np.ndarray, lengths: np.ndarray, line: np.ndarray) -> dict[str, float]:
    return {
        "start": float(line[0]),
        "end": float(line[-1]),
        "min": float(line.min()),
        "max": float(line.max()),
        "mean_over_t": coefficients.mean_over_t(t, line),
        "mean_over_length": coefficients.mean_over_length(lengths, line),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# {report['ensemble']}, {report['points']} points of curve {report['component']}",
        "",
        report["measured_on"],
        "",
    ]
    for name, way in report["ways"].items():
        ratio = way["length_ratio"]
        lines += [f"## {name}" + (f": {ratio:.3f} times as long as the segment" if ratio is not None else ""), ""]
        body = [
            [column.replace("_", " "), *(f"{value:.4f}" for value in way["summary"][column].values())]
            for column in COLUMNS
        ]
        headers = ["", "t = 0", "t = 1", "min", "max", "mean over t (eq. 2)", "mean over length (eq. 1)"]
        lines += [tabulate(body, headers, tablefmt="github", disable_numparse=True), ""]
    lines += [
        "Train loss is the cross-entropy with L2, in nats; NLL in nats, `fitted` with each point's own temperature from validation; "
        "`pair error` is the test error of the average of two networks, the one at t = 0 and the one at t.",
        "",
    ]
    return "\n".join(lines)


def plot(report: dict[str, Any]) -> Figure:
    """Figure 2 of the paper: train loss, test error, and error of the two-network ensemble, along the path."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = {
        "train_loss": "train loss (L2 included)",
        "test_error": "test error, %",
        "pair_error": "error of the pair (0, t), %",
    }
    for axes, (column, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, way in report["ways"].items():
            values = np.array(way["series"][column]) * (1 if column == "train_loss" else 100)
            axes.plot(report["t"], values, "--" if name == "segment" else "-", label=name)
        axes.set(xlabel="t", ylabel=label, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(report["ensemble"])
    return figure
