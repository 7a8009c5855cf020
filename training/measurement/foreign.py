"""How well foreign images are distinguished from those of the test split, by each measure of uncertainty and by novelty."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch.nn import functional

from models_store.graphs.runtime import EnsembleSession
from models_store.inputs import kinds
from models_store.manifest import InputSpec
from models_store.store import Version
from models_store.uncertainty import UNCERTAINTY_MEASURES, Prediction
from training import data
from training.data import generated
from training.errors import DataError
from training.measurement import decisions
from training.members import metrics

SIGNS = {**UNCERTAINTY_MEASURES, "novelty": 1}


def measure(
    version: Version,
    session: EnsembleSession,
    options: data.DataOptions,
    names: Sequence[str],
    limit: int | None,
    average: Prediction,
) -> list[dict[str, Any]]:
    """AUROC of each measure, and the share that is called novel, for each foreign set.

    Args:
        version: the version.
        session: the same.
        options: the data of its test split; classes that were held out of it are the first foreign set.
        names: of the other sets: data sets, `noise` and `textures`.
        limit: largest number of images of a set.
        average: the answers to the images of the test split.

    Raises:
        DataError: a data set is unknown, missing or malformed.
    """
    spec = version.manifest.input
    found: list[dict[str, Any]] = []
    if options.hold_out:
        images, notes = data.foreign(options, limit)
        found.append(_of(version, session, f"held-out classes: {', '.join(options.hold_out)}", images, notes, average))
    for name in names:
        if name in generated.SETS:
            images, notes = generated.rows(name, spec)[:limit], list[str]()
        else:
            own = dataclasses.replace(options.of_other(name), mean=None, std=None, limit=None, hold_out=())
            images, notes = data.foreign(own, limit)
        found.append(_of(version, session, name, fit(images, spec, name), notes, average))
    return found


def _of(
    version: Version,
    session: EnsembleSession,
    name: str,
    images: NDArray[np.float32],
    notes: list[str],
    average: Prediction,
) -> dict[str, Any]:
    outside = session.predict(images)
    is_foreign = np.repeat([False, True], [len(average.label), len(images)])
    calibration = decisions.of(version)
    return {
        "name": name,
        "images": len(images),
        "notes": notes,
        "detected": decisions.share(calibration.novel(outside.novelty)) if calibration else None,
        "auroc": {
            key: metrics.auroc(sign * np.concatenate([getattr(average, key), getattr(outside, key)]), is_foreign)
            for key, sign in SIGNS.items()
        },
    }


def fit(inputs: kinds.Inputs, spec: InputSpec, name: str) -> kinds.Inputs:
    """Foreign inputs as the ensemble takes them: images are resized, others must have the right shape and range.

    Raises:
        DataError: they do not.
    """
    if spec.kind == "image" and inputs.ndim == 4:
        channels, height, width = spec.shape
        return fit_images(inputs, (channels, height, width))
    fault = kinds.fault(spec, inputs) if kinds.fits(spec, inputs.shape) else f"has the shape {inputs.shape}"
    if fault is not None:
        raise DataError(f"The foreign set {name} {fault}; the ensemble takes {spec.kind} {kinds.shown(spec)}.")
    return kinds.arranged(spec, inputs)


def as_markdown(found: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the report that a person reads."""
    auroc = [[one["name"], *(f"{one['auroc'][key]:.4f}" for key in SIGNS)] for one in found]
    headers = ["AUROC of foreign images", *(key.replace("_", " ") for key in SIGNS)]
    lines = ["## Foreign images", "", tabulate(auroc, headers, tablefmt="github", disable_numparse=True), ""]
    for one in found:
        rate = (
            f" {decisions.with_interval(one['detected'])} of them are called unlike the training images."
            if one["detected"]
            else ""
        )
        lines.append(" ".join([f"- Foreign images: {one['images']} of {one['name']}.{rate}", *one["notes"]]))
    return [*lines, ""]


def fit_images(images: NDArray[np.float32], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Foreign images (N, c, h, w) as (N, C, H, W), resized bilinearly. If c ≠ C, their channels' mean is repeated."""
    tensor = torch.from_numpy(images)
    if tensor.shape[1] != shape[0]:
        tensor = tensor.mean(dim=1, keepdim=True).expand(-1, shape[0], -1, -1)
    if tuple(tensor.shape[2:]) != shape[1:]:
        tensor = functional.interpolate(tensor, size=shape[1:], mode="bilinear", antialias=True)
    return tensor.clamp(0, 1).contiguous().numpy()
