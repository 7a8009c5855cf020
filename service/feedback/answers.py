"""What is kept of an answer until its labels are known, and how well it did once they are."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models_store.manifest import ECE_BINS
from models_store.uncertainty import Prediction

OVERHEAD = 200  # approximate bytes of a record without its arrays
LEAST_PROBABILITY = 1e-12  # as in models_store.scores


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer to one request, and the images of it that are kept."""

    request_id: str
    time: float
    ensemble: str
    version: int
    mode: str
    classes: int
    labels: NDArray[np.int32]  # (rows,)
    confidence: NDArray[np.float64] | None  # (rows,); None if the policy hides it
    probs: NDArray[np.float32] | None  # (rows, classes)
    coverage: float | None = None  # of the prediction sets
    sets: NDArray[np.bool_] | None = None  # (rows, classes)
    answered: NDArray[np.bool_] | None = None  # (rows,): the decision is "predict"
    kept_images: tuple[tuple[int, NDArray[np.float32]], ...] = ()  # row and image (C, H, W) in [0, 1]

    @property
    def rows(self) -> int:
        """Number of images of the request."""
        return len(self.labels)

    @property
    def size(self) -> int:
        """Bytes that the record takes without its images, about."""
        arrays = (self.labels, self.confidence, self.probs, self.answered)
        return OVERHEAD + sum(0 if one is None else one.nbytes for one in arrays)

    @property
    def held(self) -> int:
        """Bytes that it takes in memory, about."""
        return self.size + sum(image.nbytes for _, image in self.kept_images)

    def record(self) -> dict[str, Any]:
        """The values of a row of the table `answers`."""
        return {
            "request_id": self.request_id,
            "time": self.time,
            "size": self.size,
            "ensemble": self.ensemble,
            "version": self.version,
            "mode": self.mode,
            "classes": self.classes,
            "labels": self.labels.tobytes(),
            "confidence": self.confidence.tobytes() if self.confidence is not None else None,
            "probs": self.probs.tobytes() if self.probs is not None else None,
            "coverage": self.coverage,
            "sets": np.packbits(self.sets).tobytes() if self.sets is not None else None,
            "answered": self.answered.tobytes() if self.answered is not None else None,
        }

    @classmethod
    def of_record(cls, row: Mapping[Any, Any]) -> Kept:
        """The answer of a row of the table `answers`."""
        labels = np.frombuffer(row["labels"], np.int32)
        shape = len(labels), int(row["classes"])
        packed = row["sets"]
        return cls(
            request_id=row["request_id"],
            time=row["time"],
            ensemble=row["ensemble"],
            version=row["version"],
            mode=row["mode"],
            classes=shape[1],
            labels=labels,
            confidence=None if row["confidence"] is None else np.frombuffer(row["confidence"]),
            probs=None if row["probs"] is None else np.frombuffer(row["probs"], np.float32).reshape(shape),
            coverage=row["coverage"],
            sets=None
            if packed is None
            else np.unpackbits(np.frombuffer(packed, np.uint8), count=math.prod(shape)).astype(bool).reshape(shape),
            answered=None if row["answered"] is None else np.frombuffer(row["answered"], np.bool_),
        )

    def images(self) -> list[dict[str, Any]]:
        """The rows of the table `images`, with the images as PNG files."""
        files = [(row, _png(image)) for row, image in self.kept_images]
        return [
            {"request_id": self.request_id, "row": row, "time": self.time, "size": len(file), "file": file}
            for row, file in files
        ]


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer compared with its label. A field is None if the policy hides it, or if it was not asked for."""

    correct: bool
    confidence: float | None
    bin: int | None  # of the confidence, 1 to ECE_BINS
    nll: float | None  # nats
    brier: float | None  # squared distance to the one-hot label, summed over classes
    coverage: float | None  # of the prediction set
    covered: bool | None
    answered: bool | None  # whether the decision was "predict"


@dataclass(frozen=True, slots=True)
class Counted:
    """What is counted for one label."""

    ensemble: str
    version: int
    mode: str
    result: Scored

    @classmethod
    def of(cls, answer: Kept, row: int, label: int) -> Counted:
        """Compare a row of an answer with its label."""
        return cls(answer.ensemble, answer.version, answer.mode, scored(answer, row, label))


def scored(answer: Kept, row: int, label: int) -> Scored:
    """Compare a row of an answer with its label."""
    correct = int(answer.labels[row]) == label
    confidence = nll = brier = number = None
    if answer.confidence is not None and answer.probs is not None:
        confidence = float(answer.confidence[row])
        number = max(1, math.ceil(confidence * ECE_BINS))  # bins (l, u], as in models_store.scores
        probs = answer.probs[row].astype(np.float64)
        nll = -math.log(max(float(probs[label]), LEAST_PROBABILITY))
        brier = float(probs @ probs) - 2 * float(probs[label]) + 1
    return Scored(
        correct=correct,
        confidence=confidence,
        bin=number,
        nll=nll,
        brier=brier,
        coverage=answer.coverage,
        covered=None if answer.sets is None else bool(answer.sets[row, label]),
        answered=None if answer.answered is None else bool(answer.answered[row]),
    )


def of_answer(
    request_id: str,
    when: float,
    ensemble: str,
    version: int,
    mode: str,
    prediction: Prediction,
    *,
    shown: bool,
    coverage: float | None,
    sets: list[list[int]] | None,
    decisions: list[tuple[Any, Any]] | None,
    images: tuple[tuple[int, NDArray[np.float32]], ...] = (),
) -> Kept:
    """Take from an answer what is kept. Without `shown`, only its labels: all else would reveal more than the policy shows."""
    classes = prediction.mean_probs.shape[1]
    chosen = None
    if sets is not None and shown:
        chosen = np.zeros((len(sets), classes), bool)
        for row, labels in enumerate(sets):
            chosen[row, labels] = True
    return Kept(
        request_id=request_id,
        time=when,
        ensemble=ensemble,
        version=version,
        mode=mode,
        classes=classes,
        labels=prediction.label.astype(np.int32),
        confidence=prediction.confidence if shown else None,
        probs=prediction.mean_probs.astype(np.float32) if shown else None,
        coverage=coverage if chosen is not None else None,
        sets=chosen,
        answered=np.array([decision == "predict" for decision, _ in decisions]) if decisions is not None else None,
        kept_images=images,
    )


def _png(image: NDArray[np.float32]) -> bytes:
    """An image (C, H, W) in [0, 1] with 1 or 3 channels as a PNG file."""
    levels = np.rint(image * 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1)).save(out, "PNG")
    return out.getvalue()
