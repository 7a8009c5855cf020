"""Load a published ensemble and predict with it. Needs neither torch nor a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models_store.decisions.calibration import Calibration, by_probability, decide, load_calibrations, uniform
from models_store.decisions.conformal import Method
from models_store.decisions.leaving import Rule, steps
from models_store.errors import DecodeError, TextError
from models_store.graphs.runtime import EnsembleSession, Group
from models_store.inputs import decoding, fields, kinds
from models_store.inputs.texts import Tokenizer
from models_store.manifest import TOKENIZER_FILE, InputSpec, Manifest
from models_store.store import Store, Version
from models_store.uncertainty import Prediction, softmax

Images = (
    ArrayLike | Sequence[str | Path | bytes] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
)


@dataclass(frozen=True)
class Answer:
    """The averaged prediction for a batch of images, and its uncertainty. Entropies are in nats."""

    probs: NDArray[np.float64]
    """Calibrated average of the members' probabilities, (batch, classes)."""
    labels: NDArray[np.intp]
    """Index of the most probable class, starting at 0, (batch,)."""
    class_names: list[str]
    """Name of the most probable class, (batch,)."""
    confidence: NDArray[np.float64]
    """Probability of the most probable class, (batch,)."""
    predictive_entropy: NDArray[np.float64]
    """Entropy of `probs`: total uncertainty, (batch,)."""
    expected_entropy: NDArray[np.float64]
    """Weighted mean of the members' entropies, (batch,)."""
    mutual_information: NDArray[np.float64]
    """predictive_entropy − expected_entropy: uncertainty due to disagreement between members, (batch,)."""
    disagreement: NDArray[np.float64]
    """Share of members, by weight, whose most probable class is not the ensemble's, (batch,)."""
    member_probs: NDArray[np.float64]
    """Calibrated probabilities of each member, (members, batch, classes). NaN where a cascade did not run the member."""

    novelty: NDArray[np.float64] | None = None
    """How unlike the training images: percentile among the calibration images, 0 to 100, (batch,); None if not calibrated."""
    prediction_sets: list[list[int]] | None = None
    """Classes of each image's prediction set, the most probable one first; None unless `coverage` was given."""
    decisions: list[str] | None = None
    """"predict" or "abstain" for each image; None unless `risk` was given."""
    reasons: list[str | None] | None = None
    """Why to abstain: "uncertain", or "unlike_training"; None where the decision is "predict"."""

    members_used: NDArray[np.intp] | None = None
    """Number of members that ran for each image, (batch,); None unless `cascade` was given."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Ensemble:
    """A published version of an ensemble."""

    name: str
    """Name and version, as NAME@VERSION."""
    folder: Path
    manifest: Manifest
    _version: Version | None = field(
        default=None, repr=False, compare=False
    )  # keeps a copy from a bucket on this machine

    def predict(
        self,
        images: Images,
        batch_size: int = 256,
        *,
        coverage: float | None = None,
        set_method: Method = "lac",
        per_class: bool = False,
        allow_empty: bool = False,
        risk: float | None = None,
        cascade: Rule | None = None,
    ) -> Answer:
        """Predict the classes of a batch of images.

        Args:
            images: what to classify. Images: (batch, C, H, W) with values in [0, 1], not normalised; or image files, as paths
                or as their bytes. Features: (batch, *shape), or rows with named fields where the ensemble has them. Tokens:
                ids (batch, length), or a list of lists of any length.
            batch_size: number of images per forward pass.
            coverage: also return prediction sets, which contain the true class with this probability, in (0, 1).
            set_method: score of the sets: "lac" (the smallest sets), "aps" (sets that grow with difficulty) or "raps".
            per_class: whether the coverage holds for each true class that has enough calibration images.
            allow_empty: whether sets may be empty; otherwise the most probable class is in every set.
            risk: decide for each image whether to answer, such that at most this share of the answers is wrong, in (0, 1).
            cascade: run the members in groups, and for each image only until it is decided: "calibrated" (the label differs from that of
                all members for a small share of images, which the calibration bounds) or "exact" (it never differs). It cannot be combined
                with `coverage` and `risk`, which are calibrated for all members together.

        Raises:
            ValueError: the array has the wrong shape or type, or values that are not allowed; or the version is not calibrated, or on too
                few images for this coverage or risk.
            FieldError: a row does not have the fields of the ensemble.
            DecodeError: a file cannot be decoded to an image of the size that the ensemble takes.
        """
        rows = self._rows(images)
        if cascade is not None:
            if coverage is not None or risk is not None:
                raise ValueError(
                    "coverage and risk are calibrated for all members together; leave them out, or leave cascade out."
                )
            return self._cascaded(rows, cascade, batch_size)
        manifest = self.manifest
        outputs = self._session.run_in_batches(rows, batch_size)
        probs = self._session.probs(outputs.logits)
        prediction = self._session.combine(probs, outputs.novelty)
        answer = _answer(prediction, probs, manifest.classes)
        if (calibration := self._calibration) is None:
            if coverage is not None or risk is not None:
                raise ValueError(
                    f"{self.name} is not calibrated, so it gives no prediction sets and decisions. "
                    f"Calibrate it: python -m models_store calibrate {manifest.name} --dataset SOURCE"
                )
            return answer
        answer = replace(answer, novelty=calibration.novelty_percentile(prediction.novelty))
        if coverage is not None:
            u = uniform(rows)
            chosen = calibration.sets(
                prediction.mean_probs, coverage, set_method, u, per_class=per_class, allow_empty=allow_empty
            )
            answer = replace(answer, prediction_sets=by_probability(chosen, prediction.mean_probs))
        if risk is not None:
            if (threshold := calibration.threshold(risk)) is None:
                raise ValueError(
                    f"{calibration.images} calibration images guarantee no risk of {risk:g} for {self.name}; the smallest is "
                    f"{calibration.least_risk}. Ask for a higher risk, or calibrate on more images."
                )
            made = decide(prediction, threshold.confidence, calibration)
            answer = replace(answer, decisions=[d for d, _ in made], reasons=[r for _, r in made])
        return answer

    def _cascaded(self, rows: kinds.Inputs, rule: Rule, batch_size: int) -> Answer:
        manifest = self.manifest
        if not (plan := steps(manifest, rule)):
            other = ' Use cascade="exact".' if rule == "calibrated" and steps(manifest, "exact") else ""
            raise ValueError(
                f"{self.name} has no {rule} cascade: it has one member, or it is not calibrated, or on too few images.{other} "
                f"Calibrate it: python -m models_store calibrate {manifest.name} --dataset SOURCE"
            )
        probs = np.full((len(manifest.members), len(rows), len(manifest.classes)), np.nan)
        used = np.zeros(len(rows), np.intp)
        predictions: list[Prediction] = []
        numbers: list[NDArray[np.intp]] = []
        for start in range(0, len(rows), batch_size):
            left = np.arange(start, min(start + batch_size, len(rows)))
            logits = np.empty((0, len(left), len(manifest.classes)), np.float32)
            ran: list[int] = []
            for group, step in zip(self._groups, plan, strict=True):
                ran += step.members
                logits = np.concatenate([logits, *(part.run(rows[left]).logits for part in group.parts)])
                prediction, stays = step.settle(logits)
                leaving = left[~stays]
                predictions.append(prediction)
                numbers.append(leaving)
                used[leaving] = step.ran
                probs[np.array(ran)[:, None], leaving] = softmax(logits[:, ~stays], step.own)
                left, logits = left[stays], logits[:, stays]
                if not len(left):
                    break
        order = np.argsort(np.concatenate(numbers))
        answer = _answer(Prediction.joined(predictions).take(order), probs, manifest.classes)
        return replace(answer, members_used=used)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.manifest.classes

    @cached_property
    def _calibration(self) -> Calibration | None:
        return load_calibrations(self.folder, self.manifest).get("average")

    @cached_property
    def _groups(self) -> list[Group]:
        return [Group(self.folder, self.manifest, step.members) for step in steps(self.manifest, "exact")]

    @cached_property
    def _session(self) -> EnsembleSession:
        return EnsembleSession(self.folder, self.manifest)

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return Tokenizer((self.folder / TOKENIZER_FILE).read_bytes()) if self.manifest.input.tokenizer else None

    def _rows(self, images: Images) -> kinds.Inputs:
        spec = self.manifest.input
        if spec.fields and isinstance(images, Mapping):
            return fields.from_columns(images, spec)
        if spec.fields and (rows := _named(images)):
            return fields.encode(rows, spec)
        if spec.kind == "tokens" and isinstance(images, list) and all(isinstance(one, str) for one in images):
            if self._tokenizer is None:
                raise ValueError(f"{self.name} takes token ids and has no tokenizer; give lists of ids.")
            try:
                images = self._tokenizer.fitting(images, spec)  # pyright: ignore[reportArgumentType] - checked above
            except TextError as error:
                raise ValueError(f"{error}.") from None
        if spec.kind == "tokens" and isinstance(images, list):
            images = kinds.from_texts(spec, images)  # pyright: ignore[reportArgumentType] - checked there
        if spec.kind == "image" and (files := _files(images)):
            return np.stack([_decoded(file, spec) for file in files])
        array = np.asarray(images)
        if array.dtype.kind not in "iuf" or not kinds.fits(spec, array.shape) or not len(array):
            raise ValueError(
                f"inputs have the shape {array.shape} and type {array.dtype}; {self.name} takes a batch of {kinds.NOUNS[spec.kind]}s "
                f"{kinds.shown(spec)}."
            )
        if (fault := kinds.fault(spec, array)) is not None:
            raise ValueError(f"the input {fault}.")
        return kinds.arranged(spec, array)


def load(name: str, *, store: Path | str | None = None, verify: bool = True) -> Ensemble:
    """Load a published ensemble.

    Args:
        name: NAME for the active version, or NAME@VERSION.
        store: the folder of published ensembles (default: $MODELS_STORE).
        verify: check all files against their hashes first.

    Raises:
        ModepathError: the ensemble or version does not exist, or it is damaged.
    """
    home = Store(Path(store) if store is not None else None)
    version = home.resolve(name)
    if verify:
        home.verify(version)
    return of_version(version)


def of_version(version: Version) -> Ensemble:
    """Return the ensemble of a version that was already read from a store, without verifying its files."""
    return Ensemble(version.name, version.folder, version.manifest, version)


def _named(images: Any) -> list[Mapping[str, Any]]:
    return list(images) if isinstance(images, Sequence) and all(isinstance(one, Mapping) for one in images) else []


def _files(images: Images) -> list[str | Path | bytes]:
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        return []
    found = [one for one in images if isinstance(one, str | Path | bytes)]
    return found if len(found) == len(images) else []


def _decoded(file: str | Path | bytes, spec: InputSpec) -> NDArray[np.float32]:
    encoded = file if isinstance(file, bytes) else Path(file).read_bytes()
    try:
        return decoding.to_array(decoding.open_image(encoded), spec)
    except DecodeError as error:
        raise DecodeError(f"{'an image' if isinstance(file, bytes) else file}: {error}") from None


def _answer(prediction: Prediction, probs: NDArray[np.float64], classes: list[str]) -> Answer:
    return Answer(
        probs=prediction.mean_probs,
        labels=prediction.label,
        class_names=[classes[int(label)] for label in prediction.label],
        confidence=prediction.confidence,
        predictive_entropy=prediction.predictive_entropy,
        expected_entropy=prediction.expected_entropy,
        mutual_information=prediction.mutual_information,
        disagreement=prediction.disagreement,
        member_probs=probs,
    )
