"""A published ensemble, and what it answers. Needs neither torch nor a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models_store import decoding
from models_store.errors import DecodeError
from models_store.graphs.runtime import EnsembleSession, in_batches
from models_store.manifest import InputSpec, Manifest
from models_store.store import Store, Version
from models_store.uncertainty import Prediction, combine, softmax

Images = ArrayLike | Sequence[str | Path | bytes]


@dataclass(frozen=True)
class Answer:
    """The averaged prediction for a batch of images, and its uncertainty. Entropies are in nats."""

    probs: NDArray[np.float64]
    """(batch, classes): the calibrated average."""
    labels: NDArray[np.intp]
    """(batch,): the most probable class, from 0."""
    class_names: list[str]
    """(batch,): its name."""
    confidence: NDArray[np.float64]
    """(batch,): its probability."""
    predictive_entropy: NDArray[np.float64]
    """(batch,): total uncertainty."""
    expected_entropy: NDArray[np.float64]
    """(batch,): the mean uncertainty of the members by themselves."""
    mutual_information: NDArray[np.float64]
    """(batch,): what the members disagree on."""
    disagreement: NDArray[np.float64]
    """(batch,): share of members with another most probable class."""
    member_probs: NDArray[np.float64]
    """(members, batch, classes)."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Ensemble:
    """A version in the store."""

    name: str
    """NAME@VERSION."""
    folder: Path
    manifest: Manifest

    def predict(self, images: Images, batch_size: int = 256) -> Answer:
        """Answer a batch.

        Args:
            images: (batch, C, H, W) with values in [0, 1], not normalised; or image files, as paths or as their bytes.
            batch_size: images that run together.

        Raises:
            ValueError: another shape, or values outside [0, 1].
            DecodeError: a file cannot be read as an image of that size.
        """
        rows = self._rows(images)
        manifest = self.manifest
        weights = np.array([member.weight for member in manifest.members])
        probs = softmax(in_batches(self._session, rows, batch_size), manifest.temperature)
        return _answer(combine(probs, weights), probs, manifest.classes)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.manifest.classes

    @cached_property
    def _session(self) -> EnsembleSession:
        return EnsembleSession(self.folder, self.manifest)

    def _rows(self, images: Images) -> NDArray[np.float32]:
        spec = self.manifest.input
        if files := _files(images):
            return np.stack([_decoded(file, spec) for file in files])
        array = np.asarray(images)
        if array.dtype.kind not in "iuf" or array.shape[1:] != spec.shape or array.ndim != 4 or not len(array):
            raise ValueError(
                f"images have the shape {array.shape} and type {array.dtype}; {self.name} takes floats (batch, {', '.join(map(str, spec.shape))})."
            )
        if not (array.min() >= 0 and array.max() <= 1):  # also for NaN
            raise ValueError("pixels must lie in [0, 1]: divide bytes by 255, and do not normalise; the ensemble does.")
        return np.ascontiguousarray(array, dtype=np.float32)


def load(name: str, *, store: Path | str | None = None, verify: bool = True) -> Ensemble:
    """A published ensemble.

    Args:
        name: NAME for the active version, or NAME@VERSION.
        store: the folder of published ensembles (default: $MODELS_STORE).
        verify: compare all files with their hashes first.

    Raises:
        ModepathError: there is none, or it is damaged.
    """
    home = Store(Path(store) if store is not None else None)
    version = home.resolve(name)
    if verify:
        home.verify(version)
    return of_version(version)


def of_version(version: Version) -> Ensemble:
    """The same of a version that was found already."""
    return Ensemble(version.name, version.folder, version.manifest)


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
