"""Decides, on the validation split, whether a new version may be served at once and which of its members are averaged.

A version is published in any case. It is not activated if it is

- significantly worse than the best of the given networks (--init, --base, --endpoints), whose batch norm is
  re-estimated and which are calibrated in the same way as members. The tests are paired on the validation images: a
  one-sided exact McNemar test of accuracy, and a one-sided t-test of the NLL.
- significantly worse than the active version of its name, if that has the same splits and classes. Only its scores are
  known, not its prediction for each image. So the tests are those for independent images, which are conservative on the
  same images: two proportions, and a mean NLL with the new version's spread for both.
- no better than chance: neither more accurate than always predicting the most frequent class, nor lower in NLL than
  always predicting the class frequencies. There is no test here, because a network that has barely begun to learn
  passes.

The level of the tests is LEVEL. The decision is stored in the run's folder, so that a finished command that is repeated
does not serve a version that was held back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import nn

from models_store.decisions import temperature
from models_store.decisions.calibration import halves
from models_store.errors import StoreError
from models_store.store import Store, Version
from models_store.uncertainty import combine, softmax
from training.data import Data, as_arrays
from training.geometry.vertices import State, put_into
from training.members import member
from training.members.export import Normalised, torch_logits
from training.runs import Run, load_weights, write_whole

LEVEL = 0.01
OUTLIER_LEVEL = 0.001  # stricter: leaving a member out changes what is averaged

Floats = NDArray[np.floating]
Labels = NDArray[np.integer]


@dataclass(frozen=True)
class Answers:
    """Predictions of one network or average on the validation images, at its own temperature."""

    right: NDArray[np.bool_]  # (batch,)
    nll: NDArray[np.float64]  # (batch,), nats

    @classmethod
    def of(
        cls, logits: Floats, labels: Labels, weights: NDArray[np.float64], temperature_: float | None = None
    ) -> Answers:
        """Compute them from logits (members, batch, classes); the temperature is fitted unless it is given."""
        fitted = temperature.fit(logits, labels, weights) if temperature_ is None else temperature_
        probs = combine(softmax(logits, fitted), weights).mean_probs
        of_label = probs[np.arange(len(labels)), labels]
        return cls(probs.argmax(axis=1) == labels, -np.log(np.maximum(of_label, 1e-12)))

    def rows(self, chosen: NDArray[np.intp]) -> Answers:
        """The predictions of some of the images."""
        return Answers(self.right[chosen], self.nll[chosen])

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return float(self.right.mean())

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f}, NLL {self.nll.mean():.4f}"


def outliers(members: Sequence[Answers], labels: Labels) -> list[int]:
    """Members to leave out of the average: those that are far worse than the median member (by NLL).

    Far worse means that the member loses more than half of the median member's gain over chance in NLL, and that it is
    significantly less accurate than the median member (one-sided exact McNemar test at OUTLIER_LEVEL). At least half of
    the members stay. All stay if even the median member has gained less than a quarter of chance's NLL: among members
    that have hardly learned anything, differences mean nothing.
    """
    chance = float(_class_frequencies_nll(labels).mean())
    nlls = [float(one.nll.mean()) for one in members]
    median = members[int(np.argsort(nlls, kind="stable")[(len(members) - 1) // 2])]
    gain = chance - float(median.nll.mean())
    return [
        index
        for index, one in enumerate(members)
        if gain >= chance / 4 and chance - nlls[index] < gain / 2 and _mcnemar(one.right, median.right) < OUTLIER_LEVEL
    ]


def refusal(
    version: Answers, labels: Labels, given: Sequence[Answers], active: Version | None, *, fingerprint: str, classes: Sequence[str],
    validation_cut: bool,
) -> str | None:  # fmt: skip
    """Why a version must not be activated automatically, as sentences; None if it may be.

    Args:
        version: predictions of its average.
        labels: labels of the validation split, (batch,).
        given: predictions of the networks that the training started from.
        active: the active version of the same name.
        fingerprint: fingerprint of the data splits.
        classes: class names.
        validation_cut: the validation images come from the training images, so that given networks may have been
            trained on them.
    """
    if not _better_than_chance(version, labels):
        return (
            f"on the {len(labels)} validation images it is not better than chance: {version}, where always predicting the most frequent class has "
            f"accuracy {np.bincount(labels).max() / len(labels):.4f}, and predicting the class frequencies NLL {_class_frequencies_nll(labels).mean():.4f}."
        )
    if given:
        best = min(given, key=lambda one: float(one.nll.mean()))
        if _mcnemar(version.right, best.right) < LEVEL or _larger(version.nll - best.nll, 1) < LEVEL:
            seen = (
                " (These images were set aside from the training images; if the given network was trained on them, they favour it.)"
                if validation_cut
                else ""
            )
            return f"on the {len(labels)} validation images it is worse than the given network: {version}, against {best}.{seen}"
    if active is not None and _comparable(active, fingerprint, classes):
        scores, count = active.manifest.validation, len(labels)
        assert scores is not None
        pooled = (version.accuracy + scores.accuracy) / 2
        spread = math.sqrt(2 * pooled * (1 - pooled) / count)
        less_accurate = scores.accuracy - version.accuracy > special.ndtri(1 - LEVEL) * spread
        if less_accurate or _larger(version.nll - scores.nll, 2) < LEVEL:
            return (
                f"on the {count} validation images it is worse than the active version {active.name}: {version}, against "
                f"accuracy {scores.accuracy:.4f}, NLL {scores.nll:.4f}."
            )
    return None


def active_version(store: Store, name: str) -> Version | None:
    """The active version of this name; None if there is none, or if it cannot be read."""
    try:
        return store.load(name)
    except StoreError:
        return None


def given_answers(
    run: Run, network: nn.Module, data: Data, count: int, bn_images: int, device: torch.device
) -> list[Answers]:
    """Predictions of the networks that the run started from, with batch norm re-estimated as for members.

    Networks whose outputs are not finite are left out.

    Args:
        run: the run that holds them.
        network: a module of the right architecture; its weights are overwritten.
        data: as for member.make.
        count: number of these networks.
        bn_images: as for member.make.
        device: where torch runs.
    """
    files = [run.start_file(f"given-{index}") for index in range(count)]
    found = [answers(network, load_weights(file), data, bn_images, device) for file in files]
    return [one for one in found if one is not None]


def answers(network: nn.Module, weights: State, data: Data, bn_images: int, device: torch.device) -> Answers | None:
    """Predictions of these weights on the validation images, with batch norm re-estimated as for members.

    Returns None if the outputs are not finite.
    """
    images, labels = as_arrays(data.validation)
    put_into(network, weights)
    served = Normalised.of(network, data).to(device)
    member.settle(network, data, bn_images, device)
    logits = torch_logits(served, images, device)
    return Answers.of(logits[None], labels, np.ones(1)) if np.isfinite(logits).all() else None


def answers_for_selection(
    network: nn.Module, weights: State, data: Data, bn_images: int, device: torch.device
) -> Answers | None:
    """The same on the half of the validation images that may choose members; the other half calibrates decisions."""
    found = answers(network, weights, data, bn_images, device)
    return found and found.rows(halves(len(data.validation))[0])


def keep_decision(run: Run, format_: str, reason: str | None, *, anyway: bool = False) -> None:
    """Store why this run's version must not be activated, or that it may be. Call it before publishing.

    Args:
        run: the run in whose folder it is stored.
        format_: of the members, as in --quantize: a run publishes a version in each.
        reason: the reason against activation; None if there is none.
        anyway: whether the version is activated in spite of the reason, because the user asks for it.
    """
    write_whole(_file(run, format_), json.dumps({"refused": None if anyway else reason}).encode())


def activation_refused(run: Run, format_: str = "none") -> str | None:
    """Why the version that this run published in this format was not activated; None if it was, or if nothing was decided."""
    try:
        return json.loads(_file(run, format_).read_text())["refused"]
    except FileNotFoundError:
        return None


def _file(run: Run, format_: str) -> Path:
    return run.folder / ("activation.json" if format_ == "none" else f"activation-{format_}.json")


def _comparable(active: Version, fingerprint: str, classes: Sequence[str]) -> bool:
    manifest = active.manifest
    same = manifest.provenance.data_fingerprint == fingerprint and manifest.classes == list(classes)
    return same and manifest.validation is not None


def _better_than_chance(version: Answers, labels: Labels) -> bool:
    most = np.bincount(labels).max() / len(labels)
    # If all are right: on a tiny split with one class, nothing is more accurate than predicting its most frequent
    # class.
    accurate = version.accuracy > most or version.right.all()
    return bool(accurate or version.nll.mean() < _class_frequencies_nll(labels).mean())


def _class_frequencies_nll(labels: Labels) -> NDArray[np.float64]:
    """NLL of each image if the prediction is always the split's own class frequencies, (batch,)."""
    return -np.log(np.bincount(labels)[labels] / len(labels))


def _mcnemar(right: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """p-value: probability of so many images that only the reference gets right, if both were equally good."""
    lost, won = int((reference & ~right).sum()), int((right & ~reference).sum())
    return float(special.bdtrc(lost - 1, lost + won, 0.5)) if lost + won else 1.0


def _larger(values: NDArray[np.float64], samples: int) -> float:
    """p-value: probability of so large a mean if the true mean were 0.

    `samples` is 2 if a second mean with the same spread was subtracted.
    """
    mean, count = float(values.mean()), len(values)
    spread = float(values.std(ddof=1)) * math.sqrt(samples / count) if count > 1 else math.inf
    return float(special.stdtr(count - 1, -mean / spread)) if 0 < spread < math.inf else 1.0
