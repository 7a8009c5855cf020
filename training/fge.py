"""Fast geometric ensembling (Garipov et al. 2018, section 5): an ensemble for the cost of one network.

Most of the budget trains one network by the plain schedule; then a short cyclical rate moves it through the valley of
low loss, and the weights are collected wherever the rate is lowest. Each collected set of weights becomes a member.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from models_store.manifest import Origin
from models_store.store import Version
from training import command, pipeline
from training.config import Config as BaseConfig
from training.errors import ConfigError
from training.optimisation.loop import Leg
from training.optimisation.schedules import fge_collections, fge_rate, rate_of
from training.pipeline import Plan
from training.runs import Run


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of FGE."""

    method: ClassVar[str] = "fge"
    RATES: ClassVar[tuple[str, ...]] = ("lr", "alpha_1", "alpha_2")

    pretrain: float = 0.8
    """Share of the budget for pre-training, which follows the plain schedule of the whole budget (see --lr) up to this
    share."""
    alpha_1: float = 0.05
    """Largest learning rate of a cycle."""
    alpha_2: float = 5e-4
    """Smallest learning rate of a cycle, at which a member is collected."""
    members: int = 6
    """Number of members collected from each start (see --starts). Their cycles share the rest of the budget equally.
    With --cycle, the length of a cycle decides the number instead."""
    cycle: float | None = None
    """Length of a cycle in epochs (default: from --members; the paper: 2 to 4 with a budget of 200)."""
    starts: tuple[int, ...] = ()
    """Epochs of the pre-training after which a checkpoint is kept. Cycles start from each of these checkpoints, and
    share the rest of the budget equally (default: the last epoch only)."""
    init: tuple[Path, ...] = ()
    """Files with your own trained weights, instead of pre-training. The whole budget is then spent on cycles, and each
    given network also becomes a member."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha_2 < self.alpha_1:
            raise ConfigError(
                f"--alpha-2 must be positive and less than --alpha-1; got {self.alpha_2:g} and {self.alpha_1:g}."
            )
        if self.init and self.runs > 1:
            raise ConfigError(
                "--runs pre-trains new networks; with --init there is one set of cycles for each given network. Leave out one of the two."
            )
        if self.init and self.starts:
            raise ConfigError(
                "--starts names epochs of the pre-training; with --init there is none. Leave out one of the two."
            )
        if not self.init and not 0 < self.pretrain_epochs < self.epochs:
            raise ConfigError(
                f"--pretrain {self.pretrain:g} of {self.epochs} epochs leaves {self.pretrain_epochs} for pre-training and "
                f"{self.epochs - self.pretrain_epochs} for cycles; both need at least one epoch."
            )
        if self.members < 1 or (self.cycle is not None and self.cycle <= 0):
            raise ConfigError("--members must be at least 1 and --cycle positive.")
        if wrong := [epoch for epoch in self.starts if not 1 <= epoch <= self.pretrain_epochs]:
            raise ConfigError(f"--starts {wrong[0]} is not an epoch of the pre-training (1 … {self.pretrain_epochs}).")

    def given(self) -> tuple[str, ...]:
        """See Config."""
        return tuple(str(file) for file in self.init)

    def beginning_from(self, given: Sequence[str]) -> Self:
        """See Config."""
        return dataclasses.replace(self, init=tuple(map(Path, given)))

    @property
    def pretrain_epochs(self) -> int:
        """Number of epochs of pre-training."""
        return 0 if self.init else round(self.pretrain * self.epochs)

    def cycles(self, steps: int) -> tuple[int, tuple[int, ...]]:
        """Returns the length of a cycle (even), and the iterations after which members are collected.

        `steps` is the number of iterations in an epoch.

        Raises:
            ConfigError: no collection fits into the budget.
        """
        starts = len(self.init or self.starts or (0,))
        available = (self.epochs - self.pretrain_epochs) * steps // starts
        # The budget ends with the last collection, in the middle of the last cycle.
        exact = available / (self.members - 0.5) if self.cycle is None else self.cycle * steps
        cycle = max(2, 2 * round(exact / 2))
        while self.cycle is None and cycle > 2 and (self.members - 1) * cycle + cycle // 2 > available:
            cycle -= 2
        collect = fge_collections(available, cycle)
        if self.cycle is None and 0 < len(collect) < self.members:
            raise ConfigError(
                f"--members {self.members} do not fit: the {available} iterations after each start have room for {len(collect)}, because a cycle "
                "has at least two. Give more --epochs, a smaller --batch-size, or fewer --members."
            )
        if not collect:
            raise ConfigError(
                f"A cycle of {cycle / steps:g} epochs never reaches its middle in the {available / steps:g} epochs after each start; "
                "shorten --cycle, or give more --epochs."
            )
        return cycle, tuple(collect if self.cycle is not None else collect[: self.members])


def plan(config: Config, run: Run, steps: int) -> Plan:
    """For each run, a leg of pre-training, unless weights are given, and a leg of cycles from each start."""
    cycle, collect = config.cycles(steps)
    note = None
    if config.cycle is not None and len(collect) != config.members:
        note = f"note: --cycle {config.cycle:g} decides the number of members collected after each start: {len(collect)}, not --members {config.members}"
    if config.init:
        files = [run.start_file(f"given-{i}") for i in range(len(config.init))]
        legs = [_cycles(config, cycle, collect, file) for file in files]
        given = [(file, Origin(cycle=0, epoch=0)) for file in files]
        return Plan(legs, [*given, *pipeline.collected(run, legs, steps)], note=note)
    legs = [leg for number in range(config.runs) for leg in _one_run(config, run, steps, number)]
    return Plan(legs, pipeline.collected(run, legs, steps), note=note)


def _one_run(config: Config, run: Run, steps: int, number: int) -> list[Leg]:
    cycle, collect = config.cycles(steps)
    total = config.epochs * steps
    starts = config.starts or (config.pretrain_epochs,)
    files = [run.start_file(f"run-{number}-epoch-{epoch}") for epoch in starts]
    of_run = f" of run {number + 1}" if config.runs > 1 else ""
    pretraining = Leg(
        label=f"pre-training{of_run}",
        iterations=config.pretrain_epochs * steps,
        rate=lambda i: rate_of(config, i, total),
        start=run.start_file(f"fresh-{number}"),
        keep=tuple(zip(starts, files, strict=True)),
    )
    return [pretraining, *(_cycles(config, cycle, collect, file, of_run) for file in files)]


def _cycles(config: Config, cycle: int, collect: tuple[int, ...], file: Path, of_run: str = "") -> Leg:
    several = len(config.init or config.starts or (0,)) > 1
    return Leg(
        label=(f"cycles from {file.stem}" if several else "cycles") + of_run,
        iterations=collect[-1],
        rate=lambda i: fge_rate(i, cycle, config.alpha_1, config.alpha_2),
        rate_option="--alpha-1",
        start=file,
        collect=collect,
    )


def run(config: Config) -> Version:
    """Train, resuming an interrupted run if there is one, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
