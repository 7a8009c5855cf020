"""Whether a new version may be served at once, and which of its members are averaged: both are decided on the validation split.

A version is published in any case. It is not activated when it is, by more than noise,

- worse than the best of the given networks (--init, --base, --endpoints), each made a member and calibrated as the version's own are.
  Paired on the validation images: a one-sided exact McNemar test of accuracy, a one-sided t-test of the NLL.
- worse than the active version of its name, where that has the same splits and classes. Only its scores are known, not its answer to each image, so
  the tests are those for independent images, cautious on the same ones: two proportions, and a mean NLL with the new version's spread for both.
- no better than chance: neither more accurate than always answering the most frequent class, nor lower in NLL than always answering the class
  frequencies. No allowance for noise: a version must show something; one that has barely begun to learn does.

Tests are at level LEVEL. The decision is kept in the run's folder, so that repeating a finished command does not serve what was held back.
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

from models_store.errors import StoreError
from models_store.store import Store, Version
from models_store.uncertainty import combine, softmax
from training.data import Data, as_arrays
from training.geometry.vertices import State, put_into
from training.members import member, temperature
from training.members.export import Normalised, torch_logits
from training.runs import Run, load_weights, write_whole

LEVEL = 0.01
OUTLIER_LEVEL = 0.001  # stricter: leaving a member out changes what is averaged

Floats = NDArray[np.floating]
Labels = NDArray[np.integer]


@dataclass(frozen=True)
class Answers:
    """What one network or average says of the validation images, at its own temperature."""

    right: NDArray[np.bool_]  # (batch,)
    nll: NDArray[np.float64]  # (batch,), nats

    @classmethod
    def of(
        cls, logits: Floats, labels: Labels, weights: NDArray[np.float64], temperature_: float | None = None
    ) -> Answers:
        """From (members, batch, classes); the temperature is fitted unless it is given."""
        fitted = temperature.fit(logits, labels, weights) if temperature_ is None else temperature_
        probs = combine(softmax(logits, fitted), weights).mean_probs
        of_label = probs[np.arange(len(labels)), labels]
        return cls(probs.argmax(axis=1) == labels, -np.log(np.maximum(of_label, 1e-12)))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f}, NLL {self.nll.mean():.4f}"


def outliers(members: Sequence[Answers], labels: Labels) -> list[int]:
    """Members to leave out of the average: those that are far worse than the median member (by NLL).

    Far worse: more than half of what the median member gains over chance, in NLL, is lost; and it is less accurate than that member by more than
    noise (one-sided exact McNemar test at OUTLIER_LEVEL). At least half of the members stay. Where even the median member has gained less than a
    quarter of chance's NLL, all stay: among members that have hardly learned anything, worse ones mean nothing.
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
    """Why a version must not be activated unasked, as sentences; None where it may.

    Args:
        version: its average.
        labels: (batch,), of the validation split.
        given: the networks that the training began from.
        active: the version of the same name that is served.
        fingerprint: of the splits.
        classes: names.
        validation_cut: the validation images come from the training images, so that given networks may have been trained on them.
    """
    if not _better_than_chance(version, labels):
        return (
            f"on the {len(labels)} validation images it is not better than chance: {version}, where always answering the most frequent class has "
            f"accuracy {np.bincount(labels).max() / len(labels):.4f}, and answering the class frequencies NLL {_class_frequencies_nll(labels).mean():.4f}."
        )
    if given:
        best = min(given, key=lambda one: float(one.nll.mean()))
        if _mcnemar(version.right, best.right) < LEVEL or _larger(version.nll - best.nll, 1) < LEVEL:
            seen = (
                " (These images were set aside from the training images; if the given network was trained on them, they flatter it.)"
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
    """The version of that name that is served; None where there is none, or none that can be read."""
    try:
        return store.load(name)
    except StoreError:
        return None


def given_answers(
    run: Run, network: nn.Module, data: Data, count: int, bn_images: int, device: torch.device
) -> list[Answers]:
    """Of the networks that the run began from, with batch norm re-estimated as a member's is; those that give no numbers are left out.

    Args:
        run: holds them.
        network: a module of the right architecture; its weights are overwritten.
        data: as for member.make.
        count: how many they are.
        bn_images: as for member.make.
        device: where torch runs.
    """
    files = [run.start_file(f"given-{index}") for index in range(count)]
    found = [answers(network, load_weights(file), data, bn_images, device) for file in files]
    return [one for one in found if one is not None]


def answers(network: nn.Module, weights: State, data: Data, bn_images: int, device: torch.device) -> Answers | None:
    """What these weights say of the validation images, with batch norm re-estimated as a member's is; None if that is not finite."""
    images, labels = as_arrays(data.validation)
    put_into(network, weights)
    served = Normalised(network, data.mean, data.std).to(device)
    member.settle(network, data, bn_images, device)
    logits = torch_logits(served, images, device)
    return Answers.of(logits[None], labels, np.ones(1)) if np.isfinite(logits).all() else None


def keep_decision(run: Run, reason: str | None, *, anyway: bool = False) -> None:
    """Remember why this run's version must not be activated, or that it may be. Call it before publishing.

    Args:
        run: where it is kept.
        reason: against activation; None: there is none.
        anyway: it is activated all the same, because the user says so.
    """
    write_whole(_file(run), json.dumps({"refused": None if anyway else reason}).encode())


def activation_refused(run: Run) -> str | None:
    """Why the version that this run published was not activated; None where it was, or nothing was decided."""
    try:
        return json.loads(_file(run).read_text())["refused"]
    except FileNotFoundError:
        return None


def _file(run: Run) -> Path:
    return run.folder / "activation.json"


def _comparable(active: Version, fingerprint: str, classes: Sequence[str]) -> bool:
    manifest = active.manifest
    same = manifest.provenance.data_fingerprint == fingerprint and manifest.classes == list(classes)
    return same and manifest.validation is not None


def _better_than_chance(version: Answers, labels: Labels) -> bool:
    most = np.bincount(labels).max() / len(labels)
    # All right: where a tiny split has one class only, nothing can be more accurate than its most frequent class.
    accurate = version.accuracy > most or version.right.all()
    return bool(accurate or version.nll.mean() < _class_frequencies_nll(labels).mean())


def _class_frequencies_nll(labels: Labels) -> NDArray[np.float64]:
    """Of each image, where the answer is always the split's own class frequencies."""
    return -np.log(np.bincount(labels)[labels] / len(labels))


def _mcnemar(right: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Chance of so many images that only the reference answers rightly, if both were equally good."""
    lost, won = int((reference & ~right).sum()), int((right & ~reference).sum())
    return float(special.bdtrc(lost - 1, lost + won, 0.5)) if lost + won else 1.0


def _larger(values: NDArray[np.float64], samples: int) -> float:
    """Chance of so large a mean, if the true one were 0; `samples` 2: a second mean with the same spread was subtracted."""
    mean, count = float(values.mean()), len(values)
    spread = float(values.std(ddof=1)) * math.sqrt(samples / count) if count > 1 else math.inf
    return float(special.stdtr(count - 1, -mean / spread)) if 0 < spread < math.inf else 1.0
