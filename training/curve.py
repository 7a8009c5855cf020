"""Curves of low loss between two networks (Garipov et al. 2018, section 3), and ensembles along them.

The ends stay fixed; the bends between them are trained so that every network on the curve has a low loss:
min over the bends of E_{t ~ U(0, 1)} L(w(t)). Members are equally spaced points of the curve; a bank holds many more
points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from models_store.manifest import Origin
from models_store.store import Version
from training import command, pipeline
from training.config import Config as BaseConfig
from training.errors import ConfigError
from training.geometry import coefficients
from training.geometry.coefficients import Coefficients, Coordinates, Shape
from training.geometry.vertices import State, combine
from training.members.publication import Points
from training.optimisation.loop import Leg
from training.optimisation.schedules import plain_rate, rate_of
from training.optimisation.steps import Between, Span
from training.pipeline import Plan
from training.runs import Run


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of a curve."""

    method: ClassVar[str] = "curve"
    RATES: ClassVar[tuple[str, ...]] = ("lr", "curve_lr")
    AVERAGES: ClassVar[bool] = False

    endpoints: tuple[str, ...] = ()
    """The two ends of the curve: checkpoint files, or members of published ensembles as NAME[@VERSION]/INDEX. Without
    --endpoints, two networks are trained first."""
    end_epochs: int | None = None
    """Epochs of training for each end, without --endpoints (default: --epochs, which is also the budget of the curve
    itself)."""
    shape: Shape = "bezier"
    """Shape of the curve: bezier has the bends as control points, polychain is a chain of straight segments through the
    bends, segment is the straight line between the ends and has nothing to train."""
    bends: int = 1
    """Number of bends: trained vertices between the ends."""
    curve_lr: float = 0.03
    """Initial learning rate of the curve, which follows the plain schedule (see --lr). The paper uses 0.3 of --lr; with
    small budgets, --lr itself was better."""
    points_per_step: int = 1
    """Number of random points of the curve whose losses are averaged in one step, each on the whole batch. A step costs
    this many forward and backward passes."""
    members: int = 6
    """Number of members per curve: equally spaced points, including both ends. Their predictions are averaged."""
    bank: int = 256
    """Number of equally spaced points in the bank, from which the service's modes random and keyed draw. 0: no bank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoints and len(self.endpoints) != 2:
            raise ConfigError(f"--endpoints must be two networks; got {len(self.endpoints)}.")
        if self.endpoints and self.runs > 1:
            raise ConfigError(
                "--runs trains new networks for each curve; between given --endpoints there is only one curve. Leave out one of the two."
            )
        if self.endpoints and self.end_epochs is not None:
            raise ConfigError(
                "--end-epochs applies to ends that are trained here; with --endpoints there are none. Leave out one of the two."
            )
        if self.bends < 1 and self.shape != "segment":
            raise ConfigError(
                f"--bends {self.bends}: a curve has at least one bend; for a straight line give --shape segment."
            )
        if self.curve_lr <= 0 or self.points_per_step < 1 or (self.end_epochs is not None and self.end_epochs < 1):
            raise ConfigError("--curve-lr, --points-per-step and --end-epochs must be positive.")
        if self.members < 2 or self.bank < 0 or self.bank == 1:
            raise ConfigError("--members must be at least 2 (the two ends); --bank must be 0 or at least 2.")

    def given(self) -> tuple[str, ...]:
        """See Config."""
        return self.endpoints

    def beginning_from(self, given: Sequence[str]) -> Self:
        """See Config."""
        return dataclasses.replace(self, endpoints=tuple(given))

    def initial_networks(self) -> int:
        """See Config."""
        return 0 if self.endpoints else 2 * self.runs

    @property
    def interior(self) -> int:
        """Number of bends; 0 for a segment."""
        return 0 if self.shape == "segment" else self.bends

    def at(self, t: np.ndarray) -> Coefficients:
        """Coefficients of the points at `t` over the vertices of one curve, in order."""
        return coefficients.curve(self.shape, t, self.interior)


def plan(config: Config, run: Run, steps: int) -> Plan:
    """For each run, legs that train two ends, unless they are given, and a leg that trains the curve between them."""
    legs: list[Leg] = []
    vertices: list[tuple[Path, Origin]] = []
    components: list[list[int]] = []
    for number in range(config.runs):
        of_run = f" of run {number + 1}" if config.runs > 1 else ""
        if config.endpoints:
            ends = [run.start_file("given-0"), run.start_file("given-1")]
        else:
            ends = [run.vertex_file(len(legs) + i, 0) for i in range(2)]
            legs += [_end(config, run, steps, 2 * number + i, f"end {i + 1}{of_run}") for i in range(2)]
        bends = [run.vertex_file(len(legs), i) for i in range(config.interior)]
        if bends:
            legs.append(_bends(config, steps, ends, f"curve{of_run}"))
        files = [ends[0], *bends, ends[1]]
        components.append([len(vertices) + i for i in range(len(files))])
        vertices += [(file, Origin()) for file in files]
    return Plan(legs, vertices, _points(config, components, len(vertices)))


def _end(config: Config, run: Run, steps: int, number: int, label: str) -> Leg:
    total = (config.end_epochs or config.epochs) * steps
    return Leg(
        label=label,
        iterations=total,
        rate=lambda i: rate_of(config, i, total),
        start=run.start_file(f"fresh-{number}"),
        collect=(total,),
    )


def _bends(config: Config, steps: int, ends: Sequence[Path], label: str) -> Leg:
    total = config.epochs * steps
    return Leg(
        label=label,
        iterations=total,
        rate=lambda i: plain_rate(i, total, config.curve_lr),
        rate_option="--curve-lr",
        collect=(total,),
        steps=Between(between(config, ends)),
        weight_sets=config.interior,
        passes=config.points_per_step,
    )


def between(config: Config, ends: Sequence[Path]) -> Span:
    """The span that trains the bends of a curve."""
    points = config.points_per_step

    def begin(fixed: Sequence[State], _: Collection[str]) -> list[State]:
        return [combine(fixed, row) for row in coefficients.on_the_segment(config.interior)]

    def draw(generator: np.random.Generator, _: Coordinates | None) -> Coefficients:
        # Stratified: one t in each of `points` equal parts. This is uniform too, and varies less than independent
        # draws.
        return config.at((np.arange(points) + generator.random(points)) / points)

    return Span(
        vertices=(ends[0], *[None] * config.interior, ends[1]),
        begin=begin,
        draw=draw,
        shown=config.at(np.array([0.5]))[0],
    )


def _points(config: Config, components: list[list[int]], total: int) -> Points:
    def spaced(count: int) -> Coefficients:
        share = [len(part) for part in np.array_split(np.arange(count), len(components))]
        rows = [
            coefficients.over_all(config.at(np.linspace(0, 1, n)), tuple(vertices), total)
            for n, vertices in zip(share, components, strict=True)
        ]
        return np.concatenate(rows)

    return Points(
        shape=config.shape,
        components=components,
        members=lambda _: spaced(config.members * config.runs),
        bank=lambda _: spaced(config.bank),
    )


def run(config: Config) -> Version:
    """Train, resuming an interrupted run if there is one, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
