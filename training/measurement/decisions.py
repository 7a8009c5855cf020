"""What the decisions of a calibrated version are worth on a test split: prediction sets, abstention, cascades, novelty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binomtest
from tabulate import tabulate

from models_store.decisions.calibration import Calibration, load_calibrations
from models_store.decisions.conformal import METHODS
from models_store.decisions.leaving import RULES, steps
from models_store.store import Version
from models_store.uncertainty import Floats, Prediction, combine, softmax

COVERAGES = (0.8, 0.9, 0.95, 0.99)
RISKS = (0.01, 0.02, 0.05, 0.1)
Labels = NDArray[np.integer]


def measure(
    version: Version, logits: NDArray[np.float32], average: Prediction, labels: Labels
) -> dict[str, Any] | None:
    """Numbers for the report; None if the version is not calibrated.

    Args:
        version: the version.
        logits: (members, images, classes), of the test split.
        average: the answers in the mode `average`.
        labels: (images,).
    """
    if (calibration := of(version)) is None:
        return None
    classes = len(version.manifest.classes)
    return {
        "images": calibration.images,
        "sets": [
            {"method": method, "per_class": per_class, **row}
            for method in METHODS
            for per_class in (False, True)
            for coverage in COVERAGES
            if (row := _sets(calibration, average, labels, coverage, method, per_class, classes)) is not None
        ],
        "risks": [_risk(calibration, average, labels, risk) for risk in RISKS],
        "false_alarms": share(calibration.novel(average.novelty)),
        "cascades": cascades(version, logits, average),
    }


def of(version: Version) -> Calibration | None:
    """The calibration of the mode `average`; None if the version is not calibrated."""
    return load_calibrations(version.folder, version.manifest).get("average")


def _sets(
    calibration: Calibration,
    average: Prediction,
    labels: Labels,
    coverage: float,
    method: Any,
    per_class: bool,
    classes: int,
) -> dict[str, Any] | None:
    if coverage > calibration.most_coverage:
        return None
    u = np.random.default_rng(1).random(len(labels))
    chosen = calibration.sets(average.mean_probs, coverage, method, u, per_class=per_class, allow_empty=True)
    covered = chosen[np.arange(len(labels)), labels]
    present = [label for label in range(classes) if (labels == label).any()]
    return {
        "coverage": coverage,
        "covered": share(covered),
        "classes_in_a_set": float(chosen.sum(axis=1).mean()),
        "empty": float((~chosen.any(axis=1)).mean()),
        "worst_class": min(float(covered[labels == label].mean()) for label in present),
    }


def _risk(calibration: Calibration, average: Prediction, labels: Labels, risk: float) -> dict[str, Any]:
    threshold = calibration.threshold(risk)
    if threshold is None:
        return {"risk": risk, "answered": None, "wrong": None}
    answered = (average.confidence > threshold.confidence) & ~calibration.novel(average.novelty)
    wrong = (average.label != labels)[answered]
    return {"risk": risk, "answered": float(answered.mean()), "wrong": share(wrong) if len(wrong) else None}


def cascades(version: Version, logits: NDArray[np.float32], average: Prediction) -> list[dict[str, Any]]:
    """Mean number of members, and share of labels that are the full average's, of each rule of the version's cascade."""
    rows: list[dict[str, Any]] = []
    for rule in RULES:
        if not (plan := steps(version.manifest, rule)):
            continue
        label = np.full(len(average.label), -1)
        used = np.zeros(len(label))
        left = np.arange(len(label))
        ran: list[int] = []
        for step in plan:
            ran += step.members
            prediction, stays = step.settle(logits[ran][:, left])
            label[left[~stays]], used[left[~stays]] = prediction.label, step.ran
            left = left[stays]
        agreement = float((label == average.label).mean())
        rows.append({"rule": rule, "members": float(used.mean()), "of": len(logits), "agreement": agreement})
    return rows


def share(true: NDArray[np.bool_]) -> list[float]:
    """A share with its exact 95 % interval."""
    interval = binomtest(int(true.sum()), len(true)).proportion_ci(0.95)
    return [float(true.mean()), float(interval.low), float(interval.high)]


def with_interval(value: Sequence[float] | None) -> str:
    """A share with its interval, for a table."""
    return "none" if value is None else f"{value[0]:.4f} ({value[1]:.4f} to {value[2]:.4f})"


def as_markdown(found: dict[str, Any]) -> list[str]:
    """The lines of the report that a person reads."""
    sets = [
        [row["method"] + (", per class" if row["per_class"] else ""), f"{row['coverage']:g}", with_interval(row["covered"]),
         f"{row['worst_class']:.4f}", f"{row['classes_in_a_set']:.3f}", f"{row['empty']:.4f}"]
        for row in found["sets"]
    ]  # fmt: skip
    risks = [
        [
            f"{row['risk']:g}",
            "not guaranteed" if row["answered"] is None else f"{row['answered']:.4f}",
            with_interval(row["wrong"]),
        ]
        for row in found["risks"]
    ]
    lines = [
        f"## Decisions, calibrated on {found['images']} images",
        "",
        tabulate(
            sets, ["prediction sets", "coverage", "covered (95 % interval)", "worst class", "classes in a set", "empty sets"],
            tablefmt="github", disable_numparse=True,
        ),
        "",
        tabulate(risks, ["risk", "answered", "wrong among them (95 % interval)"], tablefmt="github", disable_numparse=True),
        "",
        f"Called unlike the training images: {with_interval(found['false_alarms'])} of these images, false alarms.",
        "",
    ]  # fmt: skip
    if found["cascades"]:
        rows = [
            [row["rule"], f"{row['members']:.2f} of {row['of']}", f"{row['agreement']:.4f}"]
            for row in found["cascades"]
        ]
        lines += [
            tabulate(
                rows,
                ["cascade", "members on average", "labels as by all members"],
                tablefmt="github",
                disable_numparse=True,
            ),
            "",
        ]
    return lines


def risk_coverage(version: Version, logits: NDArray[np.float32], average: Prediction, labels: Labels) -> Figure:
    """Errors among the answers given against their share: the ensemble, and its best member alone, by confidence."""
    members = version.manifest.members
    scored = [k for k, member in enumerate(members) if member.validation]
    best = max(scored, key=lambda k: members[k].validation.accuracy) if scored else 0  # pyright: ignore[reportOptionalMemberAccess]
    alone = combine(softmax(logits[[best]], members[best].temperature), np.ones(1))
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, prediction in ((f"average of {len(members)}", average), (f"member {best} alone", alone)):
        share, errors = curve(prediction.confidence, prediction.label != labels)
        axes.plot(100 * share, 100 * errors, label=name)
    axes.set(
        xlabel="answers given, most confident first, %", ylabel="wrong among them, %", xlim=(0, 100), ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(version.name)
    return figure


def curve(confidence: Floats, wrong: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Share of answers given, in order of confidence, and the share of errors among them."""
    order = np.argsort(-confidence, kind="stable")
    count = np.arange(1.0, len(order) + 1)
    return count / len(order), np.cumsum(wrong[order]) / count
