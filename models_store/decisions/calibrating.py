"""Calibrates a version: divides labelled images, fits temperatures and a cascade on one half, and measures on the other."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models_store import manifest
from models_store.bank import Bank
from models_store.decisions import cascade, novelty, temperature
from models_store.decisions.calibration import SEED, Answers, Way, drawn, halves, save_answers
from models_store.errors import StoreError
from models_store.graphs.novelty import Detector
from models_store.graphs.runtime import EnsembleSession, MemberSession, in_batches
from models_store.inputs import kinds
from models_store.inputs.kinds import Inputs
from models_store.manifest import Draft
from models_store.scores import score
from models_store.store import Store, Version
from models_store.uncertainty import Floats, combine, softmax

Novelty = tuple[Detector, manifest.Novelty]  # a detector and its record


@dataclass(frozen=True)
class Labelled:
    """Images that the members were not trained on, with their classes."""

    images: Inputs  # (images, *shape), or rows or texts
    labels: NDArray[np.int64]  # (images,)
    source: str  # where they come from, for the operator
    seen: tuple[Inputs, NDArray[np.int64], str] | None = None
    """Images that the members were trained on, their classes and their source: novelty is a distance from them. None: it is
    a distance from the first half."""


def from_npz(file: Path) -> Labelled:
    """Read the arrays `x` (images, *shape), pixels in [0, 1] or bytes, features or token ids, and `y` (images,) of an npz file.

    Raises:
        StoreError: the file cannot be read, or does not hold these arrays.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["x"], arrays["y"]
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{file} is not an npz file with the arrays x (images) and y (labels): {error}. Write it with numpy.savez(file, x=…, y=…)."
        ) from None
    if images.dtype.kind not in "iuf" or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise StoreError(
            f"{file} holds x of type {images.dtype} and y of type {labels.dtype} {labels.shape}; x are numbers, y whole numbers, one for each row of x."
        )
    return Labelled(images, labels.astype(np.int64), str(file))


def measure(
    staged: Path,
    file: str,
    given: Labelled,
    logits: NDArray[np.float32],
    weights: Floats,
    average: float,
    alone: Sequence[float],
    bank: Bank | None,
    kept: Novelty | None = None,
) -> manifest.Calibration | None:
    """Measure a version's answers, and write them into its staged folder; None if there are fewer than two images.

    Args:
        staged: the folder of the version's files.
        file: the first member, in this folder.
        given: the whole split. Temperatures were fitted on its first half, see calibration.halves.
        logits: of all members and images, (members, images, classes).
        weights: (members,), summing to 1.
        average: temperature of the average.
        alone: temperature of each member alone.
        bank: the networks of the modes that draw one; None: the members.
        kept: the detector of novelty of an earlier version of these members; None: fit one.
    """
    labels = given.labels
    if len(labels) < 2:
        return None
    first, second = halves(len(labels))
    found = kept or _novelty(staged / file, given)
    far = None
    if found is not None:
        found[0].save(staged)
        far = novelty.scores(found[0], staged / file, given.images[second])
    ways: dict[Way, Answers] = {
        "average": Answers.of(
            combine(softmax(logits[:, second], average), weights, far), labels[second], given.images[second]
        )
    }

    def of_member(number: int, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return of_row[number][images] / np.float32(alone[number])

    def of_point(number: int, images: NDArray[np.float32]) -> NDArray[np.float32]:
        assert bank is not None
        session = MemberSession(bank.template, weights=bank.weights(number), threads=1)
        return in_batches(session, images) / np.float32(bank.temperature[number])

    if bank is None:
        of_row = logits[:, second]
        rows = np.arange(len(second))
        of_drawn = drawn(len(logits), of_member, rows, SEED)  # pyright: ignore[reportArgumentType]
    else:
        of_drawn = drawn(len(bank), of_point, given.images[second], SEED)
    ways["drawn"] = Answers.of(combine(softmax(of_drawn)[None], np.ones(1)), labels[second], given.images[second])
    save_answers(staged, ways)
    return manifest.Calibration(
        images=len(second),
        seed=SEED,
        source=given.source,
        ways=list(ways),
        cascade=cascade.fit(logits, labels, weights, average, (first, second), temperature.fit),
        novelty=found and found[1],
    )


def _novelty(file: Path, given: Labelled) -> Novelty | None:
    first, _ = halves(len(given.labels))
    images, labels, source = given.seen or (given.images[first], given.labels[first], given.source)
    if (detector := novelty.fit(file, 0, images, labels)) is None:
        return None
    return detector, manifest.Novelty(
        member=0, tensor=detector.tensor, features=len(detector.map), images=len(labels), source=source
    )


def calibrate(store: Store, version: Version, given: Labelled, *, activate: bool = True) -> Version:
    """Publish a copy of a version with temperatures and a calibration from these images.

    Raises:
        StoreError: there are too few images, or they do not fit the version.
    """
    record, classes = version.manifest, len(version.manifest.classes)
    if record.input.kind == "image" and given.images.dtype == np.uint8:
        given = replace(given, images=given.images / np.float32(255))
    _check(version, given, classes)
    given = replace(given, images=kinds.arranged(record.input, given.images))
    store.verify(version)
    logits = in_batches(EnsembleSession(version.folder, record), given.images)
    if not np.isfinite(logits).all():
        raise StoreError(
            f"A member of {version.name} answers an image of {given.source} with NaN or infinity; train it again."
        )
    first, _ = halves(len(given.labels))
    weights = np.array([member.weight for member in record.members])
    average = temperature.fit(logits[:, first], given.labels[first], weights)
    alone = [temperature.fit(logits[[k]][:, first], given.labels[first], np.ones(1)) for k in range(len(logits))]
    with store.staging(record.name) as staged:
        for path in record.files:
            if path not in (manifest.CALIBRATION_FILE, manifest.NOVELTY_FILE, manifest.EXAMPLES_FILE):
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(version.folder / path, staged / path)
        bank = Bank.load(version.folder / "bank") if record.bank else None
        detector = Detector.load(version.folder, record)
        kept = (
            (detector, record.calibration.novelty)
            if detector and record.calibration and record.calibration.novelty
            else None
        )
        draft = Draft.model_validate(
            {
                **{name: getattr(record, name) for name in Draft.model_fields},
                "members": [
                    m.model_copy(update={"temperature": t, "validation": score(softmax(z, t), given.labels)})
                    for m, t, z in zip(record.members, alone, logits, strict=True)
                ],
                "validation": score(combine(softmax(logits, average), weights).mean_probs, given.labels),
                "temperature": average,
                "calibration": measure(
                    staged, record.members[0].file, given, logits, weights, average, alone, bank, kept
                ),
                "provenance": record.provenance.model_copy(update={"run": None}),
            }
        )
        return store.publish(record.name, staged, draft, activate=activate)


def _check(version: Version, given: Labelled, classes: int) -> None:
    spec, labels = version.manifest.input, given.labels
    if not kinds.fits(spec, given.images.shape) or len(given.images) != len(labels):
        raise StoreError(
            f"{version.name} takes {kinds.NOUNS[spec.kind]}s {kinds.shown(spec)}; {given.source} holds an array {given.images.shape} and "
            f"labels {labels.shape}. Give one label for each."
        )
    if len(labels) < 20:
        raise StoreError(
            f"{given.source} holds {len(labels)} {kinds.NOUNS[spec.kind]}s; a calibration needs at least 20, better 1000."
        )
    if (fault := kinds.fault(spec, given.images)) is not None:
        raise StoreError(f"{given.source} {fault}.")
    if not (labels.min() >= 0 and labels.max() < classes):
        raise StoreError(
            f"{given.source} has labels from {labels.min()} to {labels.max()}; {version.name} knows {classes} classes, numbered from 0."
        )
