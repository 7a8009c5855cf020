"""Fit the detector of novelty: the distribution of a member's features on images that it was trained on.

Uncertainty compares classes with each other, so an image that is far from all of them may get a certain answer. The
distance of features from those of training images sees it. benchmarks/decisions/novelty.py measures both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from models_store.errors import MemberError
from models_store.graphs.novelty import Detector, cut_at, features_of
from models_store.graphs.runtime import MemberSession, Part, default_threads, in_batches

MOST_FEATURES = 4096  # the map has the square of this number of values
FEWEST_IMAGES = 20


def fit(file: Path, member: int, images: NDArray[np.float32], labels: NDArray[np.integer]) -> Detector | None:
    """Fit the detector of a version.

    Args:
        file: the ONNX file of the member whose features are used.
        member: its index.
        images: (images, C, H, W) in [0, 1], best those of the training.
        labels: (images,).

    Returns:
        None if the member has no features of at most MOST_FEATURES numbers, if they do not vary, or if there are fewer
        than FEWEST_IMAGES images.
    """
    model = onnx.load_from_string(file.read_bytes())
    tensor = features_of(model)
    if tensor is None or len(images) < FEWEST_IMAGES:
        return None
    try:
        session = MemberSession(cut_at(model, tensor))
        size = session.logits(images[:1]).shape[1]
        if size > MOST_FEATURES:
            return None
        features = in_batches(session, images).astype(np.float64)
    except MemberError:  # the value has no batch axis, or another type
        return None
    return None if not np.isfinite(features).all() else of_features(features, labels, member, tensor)


def scores(detector: Detector, file: Path, images: NDArray[np.float32], size: int = 256) -> NDArray[np.float32]:
    """Novelty of images (images, C, H, W) in [0, 1], by the member in an ONNX file: (images,)."""
    part = Part(detector.attached_to(file), str(file), "auto", default_threads())
    found = [part.run(images[i : i + size]).novelty for i in range(0, len(images), size)]
    return np.concatenate([values for values in found if values is not None])


def of_features(
    features: NDArray[np.float64], labels: NDArray[np.integer], member: int, tensor: str
) -> Detector | None:
    """Fit a detector to features (images, features) of images with known classes; None if they do not vary."""
    present, index = np.unique(labels, return_inverse=True)
    means = np.stack([features[index == i].mean(axis=0) for i in range(len(present))])
    covariance = shrunk_covariance(features - means[index])
    values, vectors = np.linalg.eigh(covariance)
    scale = float(values.mean())
    if not scale > 0:
        return None
    whitening = vectors / np.sqrt(np.maximum(values, 1e-6 * scale))
    centre = means.mean(axis=0)
    return Detector(
        member=member,
        tensor=tensor,
        map=whitening.astype(np.float32),
        shift=(-centre @ whitening).astype(np.float32),
        means=((means - centre) @ whitening).astype(np.float32),
    )


def shrunk_covariance(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """Covariance (features, features) of centred rows (images, features), shrunk towards a multiple of the identity.

    With few images for many features the empirical covariance is nearly singular. The amount of shrinkage is that of Ledoit
    and Wolf 2004, which is optimal for many images.
    """
    count, size = centred.shape
    empirical = centred.T @ centred / count
    scale = np.trace(empirical) / size
    identity = np.eye(size)
    distance = np.square(empirical - scale * identity).sum() / size
    if distance == 0:
        return empirical
    fourth = np.square(np.square(centred).sum(axis=1)).sum() / count
    noise = (fourth - np.square(empirical).sum()) / (count * size)
    share = min(noise, distance) / distance
    return (1 - share) * empirical + share * scale * identity
