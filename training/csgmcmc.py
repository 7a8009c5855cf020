"""Cyclical stochastic gradient MCMC (Zhang et al. 2020): each cycle explores with SGD, then samples with noise.

The rate falls along a cosine in each cycle. In its last part noise (SGHMC) makes the weights samples of the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from models_store.store import Version
from training import command, pipeline
from training.config import Config as BaseConfig
from training.errors import ConfigError
from training.optimisation.loop import Leg
from training.optimisation.schedules import snapshot_collections, snapshot_rate
from training.optimisation.steps import OneNetwork, Pull, Step, Training
from training.pipeline import Plan
from training.runs import Run


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of cyclical SG-MCMC."""

    method: ClassVar[str] = "csgmcmc"

    cycles: int = 4
    """Number of cycles that divide the budget equally. In each, the learning rate falls from --lr to nearly 0."""
    samples: int = 3
    """Number of members collected in each cycle, equally spaced over its sampling stage (see --sampling)."""
    sampling: float = 0.2
    """Share of each cycle, at its end, that is its sampling stage (1 − β in the paper). Noise is added only there."""
    posterior_temperature: float = 1.0
    """Temperature of the sampled posterior: 1 samples the posterior itself, smaller values concentrate on its mode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer != "sgd" or self.clip_norm is not None or self.ema or self.layer_decay != 1:
            raise ConfigError(
                "csgmcmc has an update rule of its own: leave out --optimizer, --clip-norm, --ema and --layer-decay."
            )
        if min(self.cycles, self.samples) < 1 or not 0 < self.sampling <= 1 or self.posterior_temperature < 0:
            bounds = "--cycles and --samples must be at least 1, --sampling must lie in (0, 1]"
            raise ConfigError(f"{bounds}, --posterior-temperature must not be negative.")


class Langevin(OneNetwork):
    """SGHMC in the velocity form of the paper's code: v ← μ v − η ∇L + √(2 η (1 − μ) T / N) ε, then w ← w + v.

    L is the mean loss with the L2 term, N the number of training images, so that at small rates w is distributed as
    exp(−N L / T). The velocity is stored in the optimizer's momentum buffer. SGD's own momentum does not include the
    learning rate, and would carry noise into the next cycle.
    """

    def __init__(self, training: Training, first_noisy: int, temperature: float):
        """Add noise from iteration `first_noisy` of the leg onwards."""
        super().__init__(training)
        self._first_noisy, self._temperature, self._config = first_noisy, temperature, training.config

    def take(self, pull: Pull, step: Step) -> torch.Tensor:
        """See Steps."""
        mu, noisy = self._config.momentum, step.iteration >= self._first_noisy
        noise = (2 * step.rate * (1 - mu) * self._temperature / step.images) ** 0.5 if noisy else 0.0
        seed = int(step.generator.integers(2**62))  # the same noise in all processes
        self._optimizer.zero_grad()
        found = pull()
        with torch.no_grad():
            for weight in self._network.parameters():
                if weight.grad is None:
                    continue
                state = self._optimizer.state[weight]
                if (velocity := state.get("momentum_buffer")) is None:
                    velocity = state["momentum_buffer"] = torch.zeros_like(weight)
                velocity.mul_(mu).add_(weight.grad + self._config.weight_decay * weight, alpha=-step.rate)
                if noise:
                    generator = torch.Generator(weight.device).manual_seed(seed)
                    velocity.add_(torch.randn(weight.shape, generator=generator, device=weight.device), alpha=noise)
                    seed += 1
                weight.add_(velocity)
        return found


def plan(config: Config, run: Run, steps: int) -> Plan:
    """One leg for each cycle. All but the first of a run continue with the weights and velocity of the one before.

    Raises:
        ConfigError: a sampling stage has fewer iterations than samples.
    """
    ends = [0, *snapshot_collections(config.epochs * steps, config.cycles)]
    legs: list[Leg] = []
    for number in range(config.runs):
        of_run = f" of run {number + 1}" if config.runs > 1 else ""
        for cycle in range(config.cycles):
            length = ends[cycle + 1] - ends[cycle]
            stage = round(config.sampling * length)
            if stage < config.samples:
                found = f"the sampling stage of a cycle has {stage} iterations"
                raise ConfigError(f"--samples {config.samples} do not fit: {found}. Give more --epochs or --sampling.")
            one = Leg(
                label=f"cycle {cycle + 1}{of_run}",
                iterations=length,
                rate=lambda i, length=length: snapshot_rate(i, [length], config.lr),
                start=run.start_file(f"fresh-{number}") if cycle == 0 else None,
                collect=tuple(length - stage + round(stage * k / config.samples) for k in range(1, config.samples + 1)),
                steps=partial(Langevin, first_noisy=length - stage + 1, temperature=config.posterior_temperature),
            )
            legs.append(one)
    return Plan(legs, pipeline.collected(run, legs, steps))


def run(config: Config) -> Version:
    """Train, resuming an interrupted run if there is one, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
