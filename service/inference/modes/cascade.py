"""The mode `cascade`: members run in groups, and a row leaves as soon as the members so far decide it.

Each group is a session of its own, so that rows of different requests that wait for the same group run together.
models_store/decisions/cascade.py explains the two rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models_store.decisions.leaving import RULES, Rule, Step, steps
from models_store.graphs.runtime import Group, Outputs, ProviderChoice, Within
from models_store.store import Version
from service.inference.session import Rows, Session, Settled


class Stage:
    """Runs one group of a cascade, and decides which rows need the next one. A task runs one graph of the group."""

    def __init__(self, group: Group, step: Step, further: Stage | None):
        """Create a stage; `further` is the next one, None for the last one."""
        self._parts, self._step, self._further = group.parts, step, further

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
        prediction, stays = self._step.settle(logits)
        if not stays.any():
            return Settled(prediction, None, self._step.ran)
        assert self._further is not None, "rows stay only where members are left"
        further: tuple[Session, Rows] = self._further, Rows(rows.images[stays], carried=logits[:, stays])
        return Settled(prediction, None, self._step.ran, stays, further)


def stages(version: Version, providers: ProviderChoice, threads: int | None, choose: Within) -> dict[Rule, Stage]:
    """Return the first stage of each rule; empty if the version has no cascade. `calibrated` needs a guarantee.

    `choose` gives the number of threads of each member; see EnsembleSession.
    """
    groups: list[Group] = []  # the rules run the same ones
    found: dict[Rule, Stage] = {}
    for rule in RULES:
        plan = steps(version.manifest, rule)
        groups = groups or [
            Group(version.folder, version.manifest, step.members, providers, threads, choose) for step in plan
        ]
        stage: Stage | None = None
        for group, step in reversed(list(zip(groups, plan, strict=bool(plan)))):
            stage = Stage(group, step, stage)
        if stage is not None:
            found[rule] = stage
    return found
