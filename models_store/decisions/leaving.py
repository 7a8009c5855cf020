"""Which rows leave a cascade after a group of members has run, and with what answer. cascade.py explains the two rules."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models_store.decisions.cascade import Logits, averaged, gap
from models_store.manifest import Manifest
from models_store.uncertainty import Floats, Prediction, combine, softmax

Rule = Literal["calibrated", "exact"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class Step:
    """One group of a cascade, and what follows when it has run."""

    members: list[int]  # of this group
    ran: int  # number of members that have run by then
    weights: Floats  # (ran,), of these members in the order in which they ran
    left: float  # weight of the members that have not run
    own: float  # temperature of the average of these members
    full: float  # temperature of the average of all members
    margin: float | None  # of the rule `calibrated`; None for `exact`

    def settle(self, logits: Logits) -> tuple[Prediction, NDArray[np.bool_]]:
        """Answer the rows that leave.

        Args:
            logits: (ran, batch, classes), of the members in the order in which they ran.

        Returns:
            The answers to the rows that leave, in order; and which rows stay, (batch,).
        """
        shares = self.weights / self.weights.sum()
        probs = softmax(logits, self.own)
        label = None
        if not self.left:
            stays = np.zeros(probs.shape[1], bool)
        elif self.margin is not None:
            stays = gap(np.einsum("k,kbc->bc", shares, probs)) < self.margin
        else:
            so_far = averaged(logits, self.weights, self.full)
            stays = gap(so_far) * self.weights.sum() <= self.left
            label = so_far.argmax(axis=1)
        if stays.any():
            probs, label = probs[:, ~stays], None if label is None else label[~stays]
        prediction = combine(probs, shares)
        if label is not None:  # the rule has decided it; at another temperature the average may name another class
            confidence = prediction.mean_probs[np.arange(len(label)), label]
            prediction = dataclasses.replace(prediction, label=label, confidence=confidence)
        return prediction, stays


def steps(manifest: Manifest, rule: Rule) -> list[Step]:
    """The groups of a version's cascade in order; empty if it has no cascade, or no guarantee for the rule `calibrated`."""
    cascade = manifest.calibration.cascade if manifest.calibration else None
    if cascade is None or (rule == "calibrated" and cascade.margins is None):
        return []
    weights = np.array([manifest.members[member].weight for member in cascade.order])
    ends = np.cumsum([0, *cascade.groups]).tolist()
    # The last group has no margin, because all its rows leave.
    margins = [*(cascade.margins or []), 0.0] if rule == "calibrated" else [None] * len(cascade.groups)
    return [
        Step(
            members=cascade.order[start:end],
            ran=end,
            weights=weights[:end],
            left=float(weights[end:].sum()),
            own=temperature,
            full=manifest.temperature,
            margin=margin,
        )
        for (start, end), temperature, margin in zip(
            itertools.pairwise(ends), cascade.temperatures, margins, strict=True
        )
    ]
