import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from models_store.store import Store
from tests.training.conftest import SMALL, make_data
from training import csgmcmc
from training.csgmcmc import Config, Langevin, plan
from training.errors import ConfigError
from training.optimisation import hardware
from training.optimisation.steps import Step, Training, pull_of
from training.runs import Run


class Weights(nn.Module):
    """One parameter per chain: each parameter is a separate Markov chain."""

    def __init__(self, chains):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(chains))


def langevin(network, first_noisy=1, temperature=1.0, **options):
    config = Config(precision="32", device="cpu", **options)
    return Langevin(Training(config, hardware.launch(config), network, make_data()), first_noisy, temperature)


def test_the_rate_is_that_of_the_paper_and_each_cycle_samples_in_its_last_share(tmp_path):
    config = Config(epochs=10, cycles=2, samples=2, sampling=0.2, lr=0.5)
    planned = plan(config, Run(tmp_path, ""), 4)  # K = 40 iterations, M = 2 cycles
    rates = [leg.rate(i) for leg in planned.legs for i in range(1, leg.iterations + 1)]
    length = math.ceil(40 / 2)
    # Zhang et al. 2020, eq. 1.
    assert rates == pytest.approx([0.25 * (math.cos(math.pi * ((k - 1) % length) / length) + 1) for k in range(1, 41)])
    assert [leg.collect for leg in planned.legs] == [(18, 20)] * 2
    assert [leg.start is None for leg in planned.legs] == [False, True]
    assert [origin.leg for _, origin in planned.vertices] == ["cycle 1", "cycle 1", "cycle 2", "cycle 2"]


def test_a_step_is_the_papers_at_changing_rates():
    network, expected, velocity = Weights(3), torch.zeros(3), torch.zeros(3)
    steps = langevin(network, first_noisy=3, weight_decay=0.1, momentum=0.9)
    target = torch.tensor([1.0, -2.0, 0.5])
    for iteration, rate in enumerate((0.1, 0.05, 0.02, 0.01), 1):
        drawn = np.random.default_rng(iteration)
        steps.take(
            pull_of(lambda: (network.weight - target).square().sum() / 2), Step(iteration, rate, drawn, images=50)
        )
        noise = torch.zeros(3)
        if iteration >= 3:
            seed = int(np.random.default_rng(iteration).integers(2**62))
            noise = math.sqrt(2 * rate * 0.1 / 50) * torch.randn(3, generator=torch.Generator().manual_seed(seed))
        velocity = 0.9 * velocity - rate * (expected - target + 0.1 * expected) + noise
        expected = expected + velocity
        assert torch.allclose(network.weight, expected, atol=1e-6)


def test_the_samples_of_a_gaussian_posterior_are_distributed_as_its_closed_form():
    """L = h/2 (w − m)², so that the posterior exp(−N L / T) is Gaussian with mean m and variance T / (N h)."""
    network, mean, curvature, images, temperature = Weights(4000), 0.3, 2.0, 50, 0.5
    steps = langevin(network, temperature=temperature, weight_decay=0.0, momentum=0.9)
    generator = np.random.default_rng(0)
    for iteration in range(1, 2001):
        steps.take(
            pull_of(lambda: curvature / 2 * (network.weight - mean).square().sum()),
            Step(iteration, 0.002, generator, images),
        )
    sd = math.sqrt(temperature / (images * curvature))
    assert stats.kstest(network.weight.detach().numpy(), "norm", (mean, sd)).pvalue > 0.01
    assert (
        stats.kstest(network.weight.detach().numpy(), "norm", (mean, 1.1 * sd)).pvalue < 1e-4
    )  # the test detects a deviation of 10 %


@pytest.mark.parametrize("options", [{"samples": 0}, {"sampling": 0.0}, {"posterior_temperature": -1.0}])
def test_what_cannot_be_carried_out_is_refused(options):
    with pytest.raises(ConfigError):
        Config(**options)


def test_samples_must_fit_into_the_sampling_stage(tmp_path):
    with pytest.raises(ConfigError, match="--samples 3 do not fit: the sampling stage of a cycle has 2"):
        plan(Config(epochs=4, cycles=2, samples=3, sampling=0.1), Run(tmp_path, ""), 10)


def test_it_trains_and_publishes_members_of_each_cycle():
    version = csgmcmc.run(Config(name="c", epochs=6, cycles=2, samples=2, keep_all_members=True, **SMALL))
    Store().verify(version)
    assert [member.origin.leg for member in version.manifest.members] == ["cycle 1", "cycle 1", "cycle 2", "cycle 2"]
    assert version.manifest.validation.accuracy > 0.2
