"""Greedy soup (Wortsman et al. 2022): the average of trained weight sets that are chosen greedily on validation.

The candidates are the weights after each of the last epochs of one training, or of several fine-tunings of one given
network at different learning rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from models_store.manifest import Origin
from models_store.store import Version
from training import command, pipeline
from training.config import Config as BaseConfig
from training.errors import ConfigError
from training.geometry.vertices import State, combine
from training.members.activation import Answers, answers_for_selection
from training.optimisation.loop import Leg
from training.optimisation.schedules import plain_rate
from training.pipeline import Plan, Trained
from training.runs import Run, load_weights, save_state


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of a greedy soup."""

    method: ClassVar[str] = "soup"

    init: Path | None = None
    """File with weights to fine-tune (safetensors, or a torch checkpoint); default: new initial weights."""
    rates: tuple[float, ...] = ()
    """Learning rates: one training of --epochs for each, all from the same weights (default: one, with --lr)."""
    last: int = 5
    """Number of epochs at the end of each training after which the weights are candidates for the average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs > 1:
            raise ConfigError(
                "--runs start from different weights, which cannot be averaged to one network; give --rates instead."
            )
        if not 1 <= self.last <= self.epochs or min(self.rates, default=1) <= 0:
            raise ConfigError(f"--last must lie between 1 and --epochs {self.epochs}, and --rates must be positive.")

    def given(self) -> tuple[str, ...]:
        """See Config."""
        return () if self.init is None else (str(self.init),)

    def beginning_from(self, given: Sequence[str]) -> Self:
        """See Config."""
        return dataclasses.replace(self, init=Path(given[0])) if given else self


def plan(config: Config, run: Run, steps: int) -> Plan:
    """A leg for each rate, which collects a candidate after each of its last epochs, and the soup of all candidates."""
    total = config.epochs * steps
    legs = [
        Leg(
            label=f"training at rate {rate:g}",
            iterations=total,
            rate=lambda i, rate=rate: plain_rate(i, total, rate),
            rate_option="--rates" if config.rates else "--lr",
            start=run.start_file("fresh-0" if config.init is None else "given-0"),
            collect=tuple(steps * epoch for epoch in range(config.epochs - config.last + 1, config.epochs + 1)),
        )
        for rate in config.rates or (config.lr,)
    ]
    candidates, soup = [file for file, _ in pipeline.collected(run, legs, steps)], run.sample_file(0)

    def cook(trained: Trained) -> None:
        if soup.exists():
            return

        def judge(state: State) -> Answers | None:
            return answers_for_selection(trained.network, state, trained.data, config.bn_images, trained.device)

        states = [load_weights(file) for file in candidates]
        save_state(soup, greedy(states, [judge(state) for state in states], judge))

    return Plan(legs, [(soup, Origin(leg="soup"))], build_vertices=cook)


def greedy(states: Sequence[State], alone: Sequence[Answers | None], judge: Callable[[State], Answers | None]) -> State:
    """Recipe 1 of the paper: in order of accuracy, a candidate is kept if the average with it is at least as accurate.

    Args:
        states: the candidates.
        alone: the predictions of each on validation; None if they are not finite.
        judge: returns the same for an average.
    """
    able = [(one, state) for one, state in zip(alone, states, strict=True) if one is not None]
    able.sort(key=lambda pair: (-pair[0].accuracy, pair[0].nll.mean()))
    best, chosen = able[0][0].accuracy, [able[0][1]]
    for _, state in able[1:]:
        found = judge(_average([*chosen, state]))
        if found is not None and found.accuracy >= best:
            best, chosen = found.accuracy, [*chosen, state]
    return _average(chosen)


def _average(states: Sequence[State]) -> State:
    return combine(states, np.full(len(states), 1 / len(states)))


def run(config: Config) -> Version:
    """Train, resuming an interrupted run if there is one, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
