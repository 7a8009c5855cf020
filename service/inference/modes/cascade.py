"""The mode `cascade`: members run in groups, and a row leaves as soon as the members so far decide it.

Each group is a session of its own, so that rows of different requests that wait for the same group run together.
models_store/decisions/cascade.py explains the two rules.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models_store.decisions.cascade import averaged, gap
from models_store.graphs.runtime import Group, Outputs, ProviderChoice
from models_store.manifest import Cascade
from models_store.store import Version
from models_store.uncertainty import Floats, Prediction, combine, softmax
from service.inference.session import Rows, Session, Settled

Rule = Literal["calibrated", "exact"]
RULES: tuple[Rule, ...] = get_args(Rule)


class Stage:
    """Runs one group of a cascade, and decides which rows need the next one. A task runs one graph of the group."""

    def __init__(
        self,
        group: Group,
        rule: Rule,
        cascade: Cascade,
        number: int,
        weights: Floats,
        temperature: float,
        further: Stage | None,
    ):
        """Create a stage.

        Args:
            group: the members of this stage.
            rule: when a row leaves.
            cascade: the cascade of the version.
            number: which stage this is, from 0.
            weights: of all members in the order of the cascade.
            temperature: of the full average.
            further: the next stage; None for the last one.
        """
        self._parts, self._further, self._rule = group.parts, further, rule
        self._end = sum(cascade.groups[: number + 1])
        self._weights, self._left = weights[: self._end], float(weights[self._end :].sum())
        self._weight = float(self._weights.sum())
        self._shares = self._weights / self._weight
        self._own, self._full = cascade.temperatures[number], temperature
        self._margin = cascade.margins[number] if cascade.margins is not None and further is not None else 2.0

    def chain(self) -> list[Stage]:
        """Return this stage and all that follow."""
        return [self, *(self._further.chain() if self._further else ())]

    def tasks(self, rows: int) -> int:
        """See session.Session."""
        return len(self._parts)

    def run(self, task: int, rows: Rows) -> Outputs:
        """See session.Session."""
        return self._parts[task].run(rows.images)

    def joined(self, results: Sequence[Outputs]) -> Outputs:
        """See session.Session."""
        return results[0] if len(results) == 1 else Outputs(np.concatenate([result.logits for result in results]))

    def settle(self, rows: Rows, outputs: Outputs) -> Settled:
        """See session.Session."""
        logits = outputs.logits if rows.carried is None else np.concatenate([rows.carried, outputs.logits])
        probs = softmax(logits, self._own)
        label = None
        if self._further is None:
            stays = np.zeros(len(rows), bool)
        elif self._rule == "calibrated":
            stays = gap(np.einsum("k,kbc->bc", self._shares, probs)) < self._margin
        else:
            so_far = averaged(logits, self._weights, self._full)
            stays = gap(so_far) * self._weight <= self._left
            label = so_far.argmax(axis=1)
        if not stays.any():
            return Settled(_predicted(probs, self._shares, label), None, self._end)
        leaves = ~stays
        prediction = _predicted(probs[:, leaves], self._shares, None if label is None else label[leaves])
        assert self._further is not None, "rows stay only where members are left"
        further: tuple[Session, Rows] = self._further, Rows(rows.images[stays], carried=logits[:, stays])
        return Settled(prediction, None, self._end, stays, further)


def stages(version: Version, providers: ProviderChoice, threads: int | None) -> dict[Rule, Stage]:
    """Return the first stage of each rule; empty if the version has no cascade. `calibrated` needs a guarantee."""
    manifest = version.manifest
    cascade = manifest.calibration.cascade if manifest.calibration else None
    if cascade is None:
        return {}
    ends = np.cumsum([0, *cascade.groups]).tolist()
    members = [cascade.order[start:end] for start, end in itertools.pairwise(ends)]
    groups = [Group(version.folder, manifest, chosen, providers, threads) for chosen in members]
    weights = np.array([manifest.members[member].weight for member in cascade.order])
    found: dict[Rule, Stage] = {}
    for rule in RULES:
        if rule == "calibrated" and cascade.margins is None:
            continue
        stage = None
        for number in reversed(range(len(groups))):
            stage = Stage(groups[number], rule, cascade, number, weights, manifest.temperature, stage)
        assert stage is not None, "a cascade has groups"
        found[rule] = stage
    return found


def _predicted(probs: Floats, shares: Floats, label: NDArray[np.intp] | None) -> Prediction:
    """The average of the members so far; with the labels that the rule has decided, if at another temperature it may name others."""
    prediction = combine(probs, shares)
    if label is None:
        return prediction
    confidence = prediction.mean_probs[np.arange(len(label)), label]
    return dataclasses.replace(prediction, label=label, confidence=confidence)
