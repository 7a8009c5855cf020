"""What the decisions of a version are worth on corrupted images, for which they were not calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from models_store.decisions.calibration import Calibration
from models_store.graphs.runtime import EnsembleSession
from models_store.store import Version
from training import logger
from training.measurement import decisions
from training.measurement.corruptions import corrupted

COVERAGE, RISK = 0.9, 0.02
Labels = NDArray[np.integer]


def measure(
    version: Version, session: EnsembleSession, images: NDArray[np.float32], labels: Labels, severities: Sequence[int]
) -> list[dict[str, Any]]:
    """Numbers for the clean images, and for each kind and severity of corruption.

    Args:
        version: the version.
        session: the same.
        images: (images, C, H, W), of the test split.
        labels: (images,).
        severities: which of the severities 1 to 5.

    Raises:
        ConfigError: the corruptions cannot be computed, see corruptions.corrupted.
    """
    calibration = decisions.of(version)
    rows: list[dict[str, Any]] = []
    for kind, severity, shifted in _sets(images, severities):
        logger.info(f"corruption {kind}, severity {severity}")
        rows.append({"kind": kind, "severity": severity, **_of(version, session, calibration, shifted, labels)})
    return rows


def _sets(images: NDArray[np.float32], severities: Sequence[int]) -> Iterator[tuple[str, int, NDArray[np.float32]]]:
    yield "clean", 0, images
    yield from corrupted(images, severities)


def _of(
    version: Version,
    session: EnsembleSession,
    calibration: Calibration | None,
    images: NDArray[np.float32],
    labels: Labels,
) -> dict[str, Any]:
    outputs = session.run_in_batches(images)
    answers = session.combine(session.probs(outputs.logits), outputs.novelty)
    row: dict[str, Any] = {"accuracy": float((answers.label == labels).mean())}
    if calibration is None:
        return row
    u = np.random.default_rng(2).random(len(labels))
    for method in ("lac", "aps"):
        if calibration.most_coverage < COVERAGE:
            continue
        chosen = calibration.sets(answers.mean_probs, COVERAGE, method, u, per_class=False, allow_empty=True)
        row[method] = float(chosen[np.arange(len(labels)), labels].mean())
        row[f"{method}_classes"] = float(chosen.sum(axis=1).mean())
    novel = calibration.novel(answers.novelty)
    row["novel"] = float(novel.mean())
    if (threshold := calibration.threshold(RISK)) is not None:
        given = (answers.confidence > threshold.confidence) & ~novel
        row["answered"] = float(given.mean())
        row["wrong"] = float((answers.label != labels)[given].mean()) if given.any() else None
    for one in decisions.cascades(version, outputs.logits, answers):
        if one["rule"] == "calibrated":
            row |= {"agreement": one["agreement"], "members": one["members"]}
    return row


def as_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the report that a person reads: means over the kinds, and the worst kind in brackets."""
    # key, title, digits, and which kind is the worst
    columns = [
        ("accuracy", "accuracy", 3, min), ("lac", f"lac at {COVERAGE:g} covers", 3, min), ("lac_classes", "classes", 2, None),
        ("aps", f"aps at {COVERAGE:g} covers", 3, min), ("aps_classes", "classes", 2, None),
        ("answered", f"risk {RISK:g}: answered", 3, None), ("wrong", "wrong among them", 4, max),
        ("novel", "called unlike the training", 3, None), ("agreement", "cascade agrees", 4, None), ("members", "members", 2, None),
    ]  # fmt: skip
    shown = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    table: list[list[str]] = []
    for severity in sorted({row["severity"] for row in rows}):
        of_kinds = [row for row in rows if row["severity"] == severity]
        cells = [f"severity {severity}" if severity else "clean"]
        for key, _, digits, worst in shown:
            values = [row[key] for row in of_kinds if row.get(key) is not None]
            worse = f" ({worst(values):.{digits}f})" if values and worst and len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{worse}" if values else "")
        table.append(cells)
    kinds = len({row["kind"] for row in rows}) - 1
    return [
        "## Corrupted images",
        "",
        f"Means over {kinds} kinds of corruption; in brackets the worst kind. All guarantees are for images like those of the calibration; these are not.",
        "",
        tabulate(table, ["images", *(title for _, title, _, _ in shown)], tablefmt="github", disable_numparse=True),
        "",
    ]
