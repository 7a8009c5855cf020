"""Snapshot ensembles (Huang et al. 2017): in each cycle the learning rate falls along a cosine, and
the weights at its end become a member.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models_store.store import Version
from training import command, pipeline
from training.config import Config as BaseConfig
from training.errors import ConfigError
from training.optimisation.loop import Leg
from training.optimisation.schedules import snapshot_collections, snapshot_rate
from training.pipeline import Plan
from training.runs import Run


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of snapshot ensembles."""

    method: ClassVar[str] = "snapshot"

    cycles: int = 5
    """Number of cycles that divide the budget equally (the paper: 5 or 6). In each, the learning rate falls from --lr
    to nearly 0."""
    members: int | None = None
    """Number of snapshots of a run that become members: those of its last cycles (default: all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 1 or not 1 <= (self.members or self.cycles) <= self.cycles:
            raise ConfigError(f"--members must lie between 1 and --cycles; got {self.members} of {self.cycles}.")


def plan(config: Config, run: Run, steps: int) -> Plan:
    """One leg for each run, with all its cycles.

    Raises:
        ConfigError: there are more cycles than iterations.
    """
    total = config.epochs * steps
    if config.cycles > total:
        raise ConfigError(f"{config.cycles} cycles do not fit into {total} iterations; give more --epochs.")
    ends = snapshot_collections(total, config.cycles)
    legs = [
        Leg(
            label="cycles" + (f" of run {number + 1}" if config.runs > 1 else ""),
            iterations=total,
            rate=lambda i: snapshot_rate(i, ends, config.lr),
            start=run.start_file(f"fresh-{number}"),
            collect=tuple(ends[-(config.members or config.cycles) :]),
        )
        for number in range(config.runs)
    ]
    return Plan(legs, pipeline.collected(run, legs, steps))


def run(config: Config) -> Version:
    """Train, resuming an interrupted run if there is one, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
