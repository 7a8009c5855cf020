"""SWAG (Maddox et al. 2019): a Gaussian over the weights that SGD visits at a constant rate, and samples from it.

With --runs k it is MultiSWAG: one Gaussian for each run. With --endpoints the Gaussian is over the bend of a curve
between two networks (Benton et al. 2021, section 4.1): each sample is a curve, and the member a random point of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import nn

from models_store.manifest import Origin
from models_store.store import Version
from training import command, curve, pipeline
from training.config import Config as BaseConfig
from training.errors import ConfigError
from training.geometry import coefficients
from training.geometry.gaussian import Gaussian
from training.geometry.vertices import combine
from training.optimisation.loop import Leg
from training.optimisation.schedules import plain_rate
from training.optimisation.seeds import Stream, derive
from training.optimisation.steps import Between, OneNetwork, Span
from training.pipeline import Plan, Trained
from training.runs import Run, load_weights, save_state


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of SWAG."""

    method: ClassVar[str] = "swag"
    RATES: ClassVar[tuple[str, ...]] = ("lr", "swag_lr")
    AVERAGES: ClassVar[bool] = False

    start: float = 0.75
    """Share of the budget that is trained before weights are collected, while the learning rate falls from --lr to
    --swag-lr. With --init, collection starts at once."""
    swag_lr: float = 0.01
    """Constant learning rate while weights are collected."""
    every: float = 1.0
    """Number of epochs between two collections of weights."""
    rank: int = 20
    """Rank of the low-rank part of the covariance: the number of last collections of weights that it is computed
    from."""
    samples: int = 30
    """Number of members drawn from each Gaussian; their predictions are averaged. 0: the mean of each Gaussian is the
    only member (SWA, Izmailov et al. 2018)."""
    init: tuple[Path, ...] = ()
    """Files with your own trained weights. One Gaussian is computed around each, and the whole budget is trained at
    --swag-lr."""
    endpoints: tuple[str, ...] = ()
    """Two networks: checkpoint files, or members of published ensembles as NAME[@VERSION]/INDEX. The Gaussian is then
    over the bend of a Bezier curve between them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < 1 or self.swag_lr <= 0 or self.every <= 0:
            raise ConfigError("--start must lie in [0, 1); --swag-lr and --every must be positive.")
        if self.rank < 2 or self.samples < 0:
            raise ConfigError("--rank must be at least 2; --samples must not be negative.")
        if self.endpoints and not self.samples:
            raise ConfigError(
                "--samples 0 publishes a mean of weights; with --endpoints that mean is a curve. Give at least 1."
            )
        if self.endpoints and (len(self.endpoints) != 2 or self.init):
            raise ConfigError("--endpoints must be two networks, and cannot be combined with --init.")
        if (self.init or self.endpoints) and self.runs > 1:
            raise ConfigError(
                "--runs trains new networks; with --init or --endpoints the networks are given. Leave out one of the two."
            )

    def given(self) -> tuple[str, ...]:
        """See Config."""
        return self.endpoints or tuple(str(file) for file in self.init)

    def beginning_from(self, given: Sequence[str]) -> Self:
        """See Config."""
        if self.endpoints:
            return dataclasses.replace(self, endpoints=tuple(given))
        return dataclasses.replace(self, init=tuple(map(Path, given)))

    def begin(self, steps: int) -> int:
        """Number of iterations before the rate is constant."""
        return 0 if self.init else round(self.start * self.epochs * steps)

    def collections(self, steps: int) -> tuple[int, ...]:
        """Iterations after which weights are collected.

        Raises:
            ConfigError: fewer than two fit into the budget.
        """
        total, apart = self.epochs * steps, self.every * steps
        begin = self.begin(steps)
        found = [begin + round(number * apart) for number in range(1, int((total - begin) / apart + 1e-9) + 1)]
        if len(set(found)) < len(found):
            raise ConfigError(f"--every {self.every:g} of an epoch is less than a step ({steps} in an epoch).")
        if len(found) < 2:
            raise ConfigError(
                f"{len(found)} collections fit between iteration {begin} and {total}; a Gaussian needs two. Give more --epochs, or change --every."
            )
        return tuple(found)


def plan(config: Config, run: Run, steps: int) -> Plan:
    """A leg for each Gaussian, and the networks sampled from it.

    Raises:
        ConfigError: see Config.collections.
    """
    collect = config.collections(steps)
    ends = [run.start_file(f"given-{i}") for i in range(len(config.endpoints))]
    if ends:
        legs = [
            _leg(config, steps, collect, "curve", None, curve.between(curve.Config(bends=1, points_per_step=1), ends))
        ]
    elif config.init:
        starts = [run.start_file(f"given-{i}") for i in range(len(config.init))]
        legs = [_leg(config, steps, collect, f"around {number}", file) for number, file in enumerate(starts)]
    else:
        starts = [run.start_file(f"fresh-{number}") for number in range(config.runs)]
        legs = [_leg(config, steps, collect, f"run {number + 1}", file) for number, file in enumerate(starts)]
    each = max(1, config.samples)
    samples = [run.sample_file(index) for index in range(each * len(legs))]

    def draw(trained: Trained) -> None:
        parameters = _names(trained.network)
        for leg in range(len(legs)):
            own = samples[leg * each : (leg + 1) * each]
            passed = [run.vertex_file(leg, number) for number in range(len(collect))]
            _draw(config, parameters, passed, own, leg, ends)

    vertices = [(file, Origin(cycle=1 + index // each)) for index, file in enumerate(samples)]
    return Plan(legs, vertices, build_vertices=draw)


def _leg(
    config: Config, steps: int, collect: tuple[int, ...], label: str, start: Path | None, span: Span | None = None
) -> Leg:
    begin, final = config.begin(steps), config.swag_lr / config.lr
    return Leg(
        label=label,
        iterations=collect[-1],
        rate=lambda i: plain_rate(i, begin, config.lr, final) if i < begin else config.swag_lr,
        rate_option="--lr and --swag-lr",
        start=start,
        collect=collect,
        steps=OneNetwork if span is None else Between(span),
    )


def _draw(
    config: Config, parameters: Collection[Sequence[str]], passed: Sequence[Path], samples: Sequence[Path], number: int, ends: Sequence[Path]
) -> None:  # fmt: skip
    if all(file.exists() for file in samples):
        return
    gaussian = Gaussian(map(load_weights, passed), parameters, config.rank)
    first_and_last = [load_weights(file) for file in ends]
    for index, file in enumerate(samples):
        seed = derive(config.seed, Stream.SWAG, number, index)
        drawn = gaussian.sample(torch.Generator().manual_seed(seed)) if config.samples else gaussian.middle()
        if first_and_last:
            t = np.random.default_rng(seed).random(1)
            drawn = combine([first_and_last[0], drawn, first_and_last[1]], coefficients.curve("bezier", t, 1)[0])
        save_state(file, drawn)


def _names(network: nn.Module) -> list[list[str]]:
    """The names of each trained parameter; a tied parameter has several."""
    found: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def run(config: Config) -> Version:
    """Train, resuming an interrupted run if there is one, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
