"""A deep ensemble (Lakshminarayanan et al. 2017): networks trained on their own, each at the full price.

Each has its own initial weights and its own order of the data. The baseline that cheaper ensembles are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models_store.store import Version
from training import command, pipeline
from training.config import Config as BaseConfig
from training.optimisation.loop import Leg
from training.optimisation.schedules import plain_rate
from training.pipeline import Plan
from training.runs import Run


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of a deep ensemble."""

    method: ClassVar[str] = "independent"

    runs: int = 5
    """Number of networks. Each costs the whole budget."""


def plan(config: Config, run: Run, steps: int) -> Plan:
    """The plain schedule for each network."""
    total = config.epochs * steps
    legs = [
        Leg(
            label=f"network {number + 1}",
            iterations=total,
            rate=lambda i: plain_rate(i, total, config.lr),
            start=run.start_file(f"fresh-{number}"),
            collect=(total,),
        )
        for number in range(config.runs)
    ]
    return Plan(legs, pipeline.collected(run, legs, steps))


def run(config: Config) -> Version:
    """Train, or go on training, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
