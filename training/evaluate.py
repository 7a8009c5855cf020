"""Measure a published ensemble on the test split, through the same sessions that serve it.

Reports the scores of the average, each member and the best single member; pairwise disagreement; the most frequent
confusions; how well each uncertainty measure detects the ensemble's errors and foreign images; what the decisions of a
calibrated version are worth, also on corrupted images. Writes them as Markdown and JSON, with a reliability diagram and a confusion matrix. With --path: loss and error along a curve
instead, and along the straight segment between its ends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tabulate import tabulate

from models_store.graphs.runtime import EnsembleSession
from models_store.manifest import ECE_BINS
from models_store.store import Store, Version
from models_store.uncertainty import UNCERTAINTY_MEASURES, Floats, Prediction, softmax
from training import command, data, logger
from training.config import data_options
from training.errors import ConfigError
from training.measurement import corruptions, decisions, foreign, path_evaluation, shift
from training.measurement.figures import answers
from training.measurement.probing import Subset
from training.measurement.report import Report
from training.members import metrics


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    name: Annotated[str, tyro.conf.Positional]
    """Ensemble to measure: NAME or NAME@VERSION."""
    dataset: str | None = None
    """Data set whose test split is used (default: the one that the ensemble was trained on)."""
    ood: tuple[str, ...] = ()
    """Foreign data sets, whose images should be detected: the test split of a data set, all images in a folder
    (imagefolder:PATH, with or without class folders), noise, or textures. They are converted to the ensemble's image
    shape. Classes that were held out of the training (--hold-out) are always measured."""
    corruptions: tuple[int, ...] = ()
    """Severities, 1 to 5, at which the test images are also corrupted: 13 to 15 kinds each, which takes as many
    evaluations. Needs pip install 'modepath[bench]'. --limit makes it faster."""
    limit: int | None = None
    """Number of test images to use (default: all); the output states it."""
    output: Path | None = None
    """Folder for report.md, report.json, reliability.png and confusion.png (default: evaluation/NAME-VERSION)."""

    path: bool = False
    """Measure points along a published curve instead, and write path.md, path.json and path.png. If the measurement is
    interrupted, the same command resumes it."""
    points: int = 61
    """With --path: number of equally spaced points."""
    component: int = 0
    """With --path: index of the curve, from 0, if the ensemble has several (trained with --runs)."""
    train_images: int | None = None
    """With --path: number of training images for train loss and error (default: all); the output states it."""
    bn_images: int = 8192
    """With --path: number of training images, without augmentation, on which batch norm is re-estimated at every
    point."""


def run(config: Config) -> Report:
    """Evaluate, log the report and write it; returns the content of report.json, with the figures."""
    version = Store().resolve(config.name)
    if config.path:
        return _along_path(config, version)
    if unknown := set(config.corruptions) - set(corruptions.SEVERITIES):
        raise ConfigError(f"--corruptions {max(unknown)}: a severity is a whole number from 1 to 5.")
    found, options = _data_of(config, version)
    session = EnsembleSession(version.folder, version.manifest)
    images, labels = data.as_arrays(found.test, config.limit)
    outputs = session.run_in_batches(images)
    logits, probs = outputs.logits, session.probs(outputs.logits)
    average = session.combine(probs, outputs.novelty)
    numbers: dict[str, Any] = {
        "ensemble": version.name,
        "dataset": options.dataset,
        "split": "test",
        "images": len(labels),
        "providers": session.providers,
        "temperature": version.manifest.temperature,
        "ece_bins": ECE_BINS,
        "scores": _scores(version, logits, labels, average),
        "pairwise_disagreement": pairwise_disagreement(probs).tolist(),
        "error_detection_auroc": _auroc(average, average.label != labels),
        "classes": version.manifest.classes,
        "confusion": confusion_counts(labels, average.label, len(version.manifest.classes)).tolist(),
    }
    if (decided := decisions.measure(version, logits, average, labels)) is not None:
        numbers["decisions"] = decided
    if outside := foreign.measure(version, session, options, config.ood, config.limit, average):
        numbers["foreign"] = outside
    if config.corruptions:
        numbers["corruptions"] = shift.measure(version, session, images, labels, config.corruptions)
    report = Report(numbers)
    report.figures = {
        "reliability": answers.reliability(average, labels, version.name),
        "confusion": answers.confusion(np.array(report["confusion"]), version.manifest.classes, version.name),
    }
    if decided is not None:
        report.figures["risk-coverage"] = decisions.risk_coverage(version, logits, average, labels)
    folder = _folder(config, version)
    folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(report)
    (folder / "report.md").write_text(text)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    report.save_figures(folder)
    logger.info(text)
    logger.info(f"written to {folder}")
    return report


def _along_path(config: Config, version: Version) -> Report:
    if config.dataset or config.ood or config.corruptions:
        raise ConfigError("--path measures on the data of the training; leave --dataset, --ood and --corruptions out.")
    if config.points < 2:
        raise ConfigError(f"--points {config.points}: at least 2 are needed, the two ends.")
    subset = Subset(config.train_images, config.limit, config.bn_images)
    return path_evaluation.evaluate(version, config.points, config.component, subset, _folder(config, version))


def _data_of(config: Config, version: Version) -> tuple[data.Data, data.DataOptions]:
    """The data set to measure on.

    Raises:
        ConfigError: it is unknown, or its image shape or classes are not those of the ensemble.
    """
    kept = version.manifest.provenance.config
    if config.dataset is None and "dataset" not in kept:
        raise ConfigError(f"{version.name} does not record what it was trained on; name the data set with --dataset.")
    options = data_options({"dataset": config.dataset, **kept})
    options = options.of_other(config.dataset) if config.dataset else options
    found = data.load(options)
    spec = version.manifest.input
    shape = spec.shape
    if found.input.kind != spec.kind or found.shape != shape or len(found.classes) != len(version.manifest.classes):
        raise ConfigError(
            f"{version.name} takes {spec.kind} {shape} of {len(version.manifest.classes)} classes; {options.dataset!r} has {found.input.kind} {found.shape} of "
            f"{len(found.classes)}. Evaluate on data like that of the training; give other data with --ood."
        )
    _check_classes(version.name, version.manifest.classes, options.dataset, found.classes)
    return found, options


def _check_classes(name: str, own: Sequence[str], dataset: str, given: Sequence[str]) -> None:
    """Compare class names one by one, unless one of the two has no names, only numbers."""
    counted = [str(label) for label in range(len(own))]
    if list(own) == list(given) or (counted in (list(own), list(given)) and sorted(own) != sorted(given)):
        return
    label = next(label for label, names in enumerate(zip(own, given, strict=True)) if names[0] != names[1])
    order = "in another order" if sorted(own) == sorted(given) else "under other names"
    raise ConfigError(
        f"{name} and {dataset!r} have their classes {order}: class {label} is {own[label]!r} in one and {given[label]!r} in the other. The labels "
        "would be wrong. Evaluate on data with the classes of the training; give other data with --ood."
    )


def _folder(config: Config, version: Version) -> Path:
    return config.output or Path("evaluation") / version.name.replace("@", "-")


def pairwise_disagreement(probs: Floats) -> Floats:
    """Share of rows for which members predict different classes: (members, members) from (members, batch, classes)."""
    labels = probs.argmax(axis=2)
    return (labels[:, None] != labels[None]).mean(axis=2)


def confusion_counts(labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Number of rows by true and predicted class, (classes, classes)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def _scores(
    version: Version, logits: NDArray[np.float32], labels: NDArray[np.integer], average: Prediction
) -> list[dict[str, Any]]:
    rows = [{"who": "average", **_row(average.mean_probs, labels)}]
    members = version.manifest.members
    for index, member in enumerate(members):
        # A single member uses its own temperature; otherwise the comparison would favour the average.
        rows.append({"who": f"member {index}", **_row(softmax(logits[index], member.temperature), labels)})
    # Chosen on validation, because choosing on test would favour it. Imported members have no validation scores.
    if all(member.validation for member in members):
        best = max(range(len(members)), key=lambda k: members[k].validation.accuracy)  # pyright: ignore[reportOptionalMemberAccess]
        rows.insert(1, {**rows[best + 1], "who": f"best single (member {best}, by validation)"})
    return rows


def _row(probs: Floats, labels: NDArray[np.integer]) -> dict[str, float]:
    wrong = probs.argmax(axis=1) != labels
    return {**metrics.score(probs, labels).model_dump(), "aurc": metrics.aurc(-probs.max(axis=1), wrong)}


def _auroc(prediction: Prediction, positive: NDArray[np.bool_]) -> dict[str, float]:
    return {
        name: metrics.auroc(sign * getattr(prediction, name), positive) for name, sign in UNCERTAINTY_MEASURES.items()
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    columns = ("accuracy", "nll", "brier", "ece", "aurc")
    table = [[row["who"], *(f"{row[c]:.4f}" for c in columns)] for row in report["scores"]]
    pairs = np.array(report["pairwise_disagreement"])
    above = pairs[np.triu_indices(len(pairs), 1)]
    lines = [
        f"# {report['ensemble']} on {report['images']} test images of {report['dataset']}",
        "",
        tabulate(table, ["", *columns], tablefmt="github", disable_numparse=True),
        "",
        f"NLL in nats, ECE over {report['ece_bins']} bins, AURC by confidence. The average at temperature "
        f"{report['temperature']:.3f}, each member at its own, all fitted on validation. Run on {report['providers'][0]}.",
        "",
    ]
    if len(above):
        lines += [f"Pairwise disagreement: mean {above.mean():.4f}, from {above.min():.4f} to {above.max():.4f}.", ""]
    if confused := _most_confused(report):
        lines += [f"Most frequent confusions (true as predicted): {confused}.", ""]
    detection = [[name.replace("_", " "), _number(value)] for name, value in report["error_detection_auroc"].items()]
    lines += [tabulate(detection, ["AUROC", "own errors"], tablefmt="github", disable_numparse=True), ""]
    if "foreign" in report:
        lines += foreign.as_markdown(report["foreign"])
    if "decisions" in report:
        lines += decisions.as_markdown(report["decisions"])
    if "corruptions" in report:
        lines += shift.as_markdown(report["corruptions"])
    return "\n".join(lines)


def _most_confused(report: dict[str, Any], most: int = 3) -> str:
    counts = np.array(report["confusion"])
    np.fill_diagonal(counts, 0)
    order = counts.argsort(axis=None)[::-1][:most]
    cells = [np.unravel_index(cell, counts.shape) for cell in order]
    classes = report["classes"]
    return ", ".join(f"{classes[a]} as {classes[b]} {counts[a, b]}" for a, b in cells if counts[a, b])


def _number(value: float) -> str:
    return "none to find" if np.isnan(value) else f"{value:.4f}"


if __name__ == "__main__":
    command.main(Config, run, __doc__)
