"""The calibration of a version: what its answers were on images that no other choice was made with.

`calibrate` runs the version as it is served, and keeps for each image of the calibration split the scores of its true
class, the confidence, whether the answer was wrong, the uncertainty and the novelty. `Calibration` turns them into prediction sets,
thresholds for abstention, novelty, and percentiles. They are kept for each way of answering: `average`, and `drawn` for the modes
in which one network is drawn for each image.

All guarantees assume that calibration images and served images are exchangeable: drawn alike, and not seen in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save  # pyright: ignore[reportUnknownVariableType]

from models_store.decisions import abstention, conformal, drift
from models_store.decisions.abstention import Threshold
from models_store.decisions.conformal import Method
from models_store.errors import CorruptionError
from models_store.inputs import kinds
from models_store.inputs.kinds import Inputs
from models_store.manifest import CALIBRATION_FILE, ECE_BINS, Manifest
from models_store.uncertainty import UNCERTAINTY_MEASURES, Floats, Prediction

Way = Literal["average", "drawn"]
Decision = Literal["predict", "abstain"]
Reason = Literal["uncertain", "unlike_training"]
SEED = 0  # of the division of the validation split, and of u; stated in the manifest
FALSE_ALARMS = 0.01  # share of images like the calibration images that are called novel


def halves(images: int, seed: int = SEED) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Divide a split into two random halves: rows for fitting and selecting, and rows for calibration. Both ascend."""
    order = np.random.default_rng(seed).permutation(images)
    cut = images - images // 2
    return np.sort(order[:cut]), np.sort(order[cut:])


@dataclass(frozen=True)
class Answers:
    """What one way of answering gave on the calibration images."""

    scores: dict[Method, Floats]  # of the true classes, (images,) each
    labels: NDArray[np.int64]  # true classes, (images,)
    wrong: NDArray[np.bool_]
    uncertainty: dict[str, Floats]  # by the names of UNCERTAINTY_MEASURES, (images,) each
    novelty: Floats  # (images,), see uncertainty.Prediction
    drift: dict[str, Floats] = field(default_factory=dict[str, Floats])
    """Values of drift.MEASURES, (images,) each; empty in versions that were calibrated before these were kept."""

    @classmethod
    def of(cls, prediction: Prediction, labels: NDArray[np.integer], images: Inputs, seed: int = SEED) -> Answers:
        """Keep what decisions need of predictions for inputs (batch, *shape) with known labels."""
        u = np.random.default_rng(seed).random(len(labels))
        rows = np.arange(len(labels))
        return cls(
            scores={m: conformal.scores(prediction.mean_probs, m, u)[rows, labels] for m in conformal.METHODS},
            labels=labels.astype(np.int64),
            wrong=prediction.label != labels,
            uncertainty={name: np.asarray(getattr(prediction, name), np.float64) for name in UNCERTAINTY_MEASURES},
            novelty=np.asarray(prediction.novelty, np.float64),
            drift=drift.statistics(images, prediction),
        )


class Calibration:
    """Decisions for new answers of one version, in one way of answering."""

    def __init__(self, answers: Answers, classes: int):
        self._answers, self._classes = answers, classes
        self._limits: dict[tuple[float, Method, bool], float | Floats] = {}
        self._thresholds: dict[float, Threshold | None] = {}

    @property
    def drift(self) -> dict[str, Floats]:
        """Values of drift.MEASURES for the calibration images, (images,) each."""
        return self._answers.drift

    @property
    def images(self) -> int:
        """Number of calibration images."""
        return len(self._answers.labels)

    @property
    def most_coverage(self) -> float:
        """The largest coverage that can be guaranteed."""
        return conformal.most_coverage(self.images)

    def reliability(self, bins: int = ECE_BINS) -> list[tuple[float, float, int]]:
        """Mean confidence, accuracy and number of calibration images in bins of equal width; empty bins are left out."""
        sure, right = self._answers.uncertainty["confidence"], ~self._answers.wrong
        bin_of = np.minimum((sure * bins).astype(int), bins - 1)
        return [
            (float(sure[here].mean()), float(right[here].mean()), int(here.sum()))
            for here in (bin_of == number for number in np.unique(bin_of))
        ]

    def classes_without_guarantee(self, coverage: float) -> list[int]:
        """Classes that have too few calibration images for this coverage of their own."""
        return conformal.classes_without_guarantee(self._answers.labels, self._classes, coverage)

    def sets(
        self, probs: Floats, coverage: float, method: Method, u: Floats, *, per_class: bool, allow_empty: bool
    ) -> NDArray[np.bool_]:
        """Prediction sets, (batch, classes).

        Args:
            probs: (batch, classes), in the way of answering that was calibrated.
            coverage: probability that a set contains the true class, in (0, 1).
            method: see conformal.
            u: (batch,), uniform on [0, 1), see `uniform`.
            per_class: whether the coverage holds for each true class, and not on average over the classes alone.
            allow_empty: False adds the most probable class to sets that would be empty.

        Raises:
            ValueError: there are too few calibration images for this coverage.
        """
        limit = self._limit(coverage, method, per_class)
        return conformal.sets(probs, conformal.scores(probs, method, u), limit, allow_empty=allow_empty)

    def _limit(self, coverage: float, method: Method, per_class: bool) -> float | Floats:
        if (known := self._limits.get(key := (coverage, method, per_class))) is None:
            own, labels = self._answers.scores[method], self._answers.labels
            if per_class:
                limit = conformal.thresholds_by_class(own, labels, self._classes, coverage)
            else:
                limit = conformal.threshold(np.sort(own), coverage)
            if len(self._limits) > 1000:  # clients choose the coverage
                self._limits.clear()
            self._limits[key] = limit
            return limit
        return known

    def threshold(self, risk: float) -> Threshold | None:
        """The confidence above which answers to images that are not novel are wrong with probability `risk` at most.

        It holds with a probability of abstention.CONFIDENCE over the choice of the calibration images. None: no
        threshold has this guarantee.
        """
        thresholds = self._thresholds
        if risk not in thresholds and len(thresholds) > 1000:  # clients choose the risk
            thresholds = self._thresholds = {}
        if risk not in thresholds:
            thresholds[risk] = abstention.threshold(*self._answerable, risk)
        return thresholds[risk]

    @cached_property
    def least_risk(self) -> float | None:
        """The smallest risk, to two digits, that a threshold can guarantee; None if there is none."""
        return abstention.least_risk(*self._answerable)

    @cached_property
    def _answerable(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Confidence, and whether the answer is wrong, of the calibration images that are not novel."""
        known = ~self.novel(self._answers.novelty)
        return self._answers.uncertainty["confidence"][known], self._answers.wrong[known]

    @cached_property
    def _sorted(self) -> dict[str, Floats]:
        """Each measure in ascending order of uncertainty."""
        return {name: np.sort(sign * self._answers.uncertainty[name]) for name, sign in UNCERTAINTY_MEASURES.items()}

    def percentile(self, measure: str, values: Floats) -> Floats:
        """Share of calibration images, in percent, that are at most as uncertain as these values of a measure."""
        at_most = np.searchsorted(self._sorted[measure], UNCERTAINTY_MEASURES[measure] * values, side="right")
        return 100 * at_most / self.images

    @cached_property
    def _sorted_novelty(self) -> Floats:
        return np.sort(self._answers.novelty)

    def novelty_percentile(self, values: Floats) -> Floats:
        """Share of calibration images, in percent, that are at most as novel as these values."""
        return 100 * np.searchsorted(self._sorted_novelty, values, side="right") / self.images

    def novel(self, values: Floats) -> NDArray[np.bool_]:
        """Whether values of novelty are among the largest FALSE_ALARMS of images like those of calibration.

        (1 + calibration images at least as novel) / (n + 1) is a conformal p-value (Bates et al. 2023).
        """
        at_least = self.images - np.searchsorted(self._sorted_novelty, values, side="left")
        return (1 + at_least) / (self.images + 1) <= FALSE_ALARMS


def decide(prediction: Prediction, limit: float, calibration: Calibration) -> list[tuple[Decision, Reason | None]]:
    """For each row whether to rely on the answer, and if not, why: it is not above a confidence, or the image is novel."""
    sure, novel = prediction.confidence > limit, calibration.novel(prediction.novelty)
    return [
        ("abstain", "unlike_training") if new else ("predict", None) if above else ("abstain", "uncertain")
        for above, new in zip(sure.tolist(), novel.tolist(), strict=True)
    ]


def by_probability(chosen: NDArray[np.bool_], probs: Floats) -> list[list[int]]:
    """The classes of each set, the most probable one first; from (batch, classes) each."""
    order = np.argsort(-probs, axis=1, kind="stable")
    kept = np.take_along_axis(chosen, order, axis=1)
    return [row[which].tolist() for row, which in zip(order, kept, strict=True)]


def uniform(images: Inputs) -> Floats:
    """One number of [0, 1) for each row, from its content: the same input always gets the same prediction set."""
    return np.array(
        [int.from_bytes(hashlib.blake2b(kinds.identity(image), digest_size=6).digest()) / 2**48 for image in images]
    )


def save_answers(folder: Path, ways: dict[Way, Answers]) -> None:
    """Write the file of a version's calibration."""
    tensors: dict[str, NDArray[np.generic]] = {}
    for way, answers in ways.items():
        tensors |= {f"{way}.score.{method}": values for method, values in answers.scores.items()}
        tensors |= {f"{way}.{name}": values for name, values in answers.uncertainty.items()}
        tensors |= {f"{way}.labels": answers.labels, f"{way}.wrong": answers.wrong.astype(np.uint8)}
        tensors[f"{way}.novelty"] = answers.novelty
        tensors |= {f"{way}.{name}": answers.drift[name] for name in drift.MEASURES if name in answers.drift}
    (folder / CALIBRATION_FILE).write_bytes(save(tensors))


def load_answers(folder: Path, ways: Sequence[Way], images: int, classes: int) -> dict[Way, Answers]:
    """Read the file of a version's calibration.

    Raises:
        CorruptionError: it cannot be read, or breaks FORMAT.md.
    """
    try:
        tensors = load_file(folder / CALIBRATION_FILE)
        found: dict[Way, Answers] = {way: _answers(tensors, way) for way in ways}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptionError(
            f"{folder / CALIBRATION_FILE} is not a calibration ({error}): restore it from a copy, or publish again."
        ) from None
    for answers in found.values():
        arrays = [*answers.scores.values(), *answers.uncertainty.values(), answers.novelty, *answers.drift.values()]
        right = all(one.shape == (images,) and one.dtype == np.float64 and np.isfinite(one).all() for one in arrays)
        labels = answers.labels
        if (
            not right
            or labels.shape != (images,)
            or answers.wrong.shape != (images,)
            or (images and not 0 <= labels.min() <= labels.max() < classes)
        ):
            raise CorruptionError(
                f"{folder / CALIBRATION_FILE} breaks FORMAT.md: it does not hold a finite number for each of {images} images. "
                "Restore it from a copy, or publish again."
            )
    return found


def load_calibrations(folder: Path, manifest: Manifest) -> dict[Way, Calibration]:
    """Read the calibrations of a version; empty if it has none.

    Raises:
        CorruptionError: the file cannot be read, or breaks FORMAT.md.
    """
    if (record := manifest.calibration) is None:
        return {}
    classes = len(manifest.classes)
    return {
        way: Calibration(answers, classes)
        for way, answers in load_answers(folder, record.ways, record.images, classes).items()
    }


def _answers(tensors: dict[str, NDArray[np.generic]], way: Way) -> Answers:
    def of(name: str) -> NDArray[np.float64]:
        return tensors[f"{way}.{name}"]  # pyright: ignore[reportReturnType]

    return Answers(
        scores={method: of(f"score.{method}") for method in conformal.METHODS},
        labels=of("labels").astype(np.int64),
        wrong=of("wrong").astype(bool),
        uncertainty={name: of(name) for name in UNCERTAINTY_MEASURES},
        novelty=of("novelty" if f"{way}.novelty" in tensors else "predictive_entropy"),
        drift={name: of(name) for name in drift.MEASURES if f"{way}.{name}" in tensors},
    )


def drawn(
    networks: int,
    logits: Callable[[int, NDArray[np.float32]], NDArray[np.float32]],
    images: NDArray[np.float32],
    seed: int,
) -> NDArray[np.float32]:
    """Logits of one network, drawn uniformly, for each image.

    Args:
        networks: number of networks to draw from.
        logits: (number of a network, images) -> logits at the temperature of that network, (batch, classes).
        images: (batch, C, H, W).
        seed: of the draw.
    """
    chosen = np.random.default_rng(seed).integers(networks, size=len(images))
    rows: NDArray[np.float32] | None = None
    for number in np.unique(chosen):
        own = np.flatnonzero(chosen == number)
        found = logits(int(number), images[own])
        if rows is None:
            rows = np.empty((len(images), found.shape[1]), np.float32)
        rows[own] = found
    assert rows is not None, "there is an image"
    return rows
