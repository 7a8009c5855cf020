"""Snapshot ensembles (Huang et al. 2017): the rate falls along a cosine and starts anew, and each fall leaves a member."""

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
    """Number of cycles: equal parts of the budget. The learning rate starts each cycle at --lr and falls to nearly 0 (the paper: 5 or 6)."""
    members: int | None = None
    """Number of last snapshots of a run that become members (default: all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 1 or not 1 <= (self.members or self.cycles) <= self.cycles:
            raise ConfigError(f"--members lie between 1 and --cycles; got {self.members} of {self.cycles}.")


def plan(config: Config, run: Run, steps: int) -> Plan:
    """One leg a run: all its cycles.

    Raises:
        ConfigError: more cycles than iterations.
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
    """Train, or go on training, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
