"""A deep ensemble (Lakshminarayanan et al. 2017): networks trained independently, each with the whole budget.

They differ in their initial weights and in the order of the data. This is the baseline for cheaper ensembles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models_store.store import Version
from training import command, pipeline
from training.config import Config as BaseConfig
from training.optimisation.loop import Leg
from training.optimisation.schedules import rate_of
from training.pipeline import Plan
from training.runs import Run


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of a deep ensemble."""

    method: ClassVar[str] = "independent"

    runs: int = 5
    """Number of networks, each of which is trained with the whole budget and becomes a member."""


def plan(config: Config, run: Run, steps: int) -> Plan:
    """One leg with the plain schedule for each network."""
    total = config.epochs * steps
    legs = [
        Leg(
            label=f"network {number + 1}",
            iterations=total,
            rate=lambda i: rate_of(config, i, total),
            start=run.start_file(f"fresh-{number}"),
            collect=(total,),
        )
        for number in range(config.runs)
    ]
    return Plan(legs, pipeline.collected(run, legs, steps))


def run(config: Config) -> Version:
    """Train, resuming an interrupted run if there is one, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
