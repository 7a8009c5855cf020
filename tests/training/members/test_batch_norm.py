import pytest
import torch
from torch import nn

from training.members import batch_norm
from training.members.batch_norm import reestimate


def test_statistics_are_those_of_the_images_given():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    images = torch.randn(40, 3, 2, 2) * 3 + 5
    network(torch.randn(8, 3, 2, 2))
    reestimate(network, images.split(10))
    norm = network[0]
    assert torch.allclose(norm.running_mean, images.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(
        norm.running_var, torch.stack([b.var(dim=(0, 2, 3)) for b in images.split(10)]).mean(0), atol=1e-4
    )


def test_deeper_layers_see_what_earlier_ones_pass_on_and_dropout_is_off():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 4), nn.BatchNorm1d(4))
    images = torch.randn(50, 1, 2, 2)
    reestimate(network, [images])
    assert torch.allclose(network[3].running_mean, network[2](images.flatten(1)).mean(0), atol=1e-5)


def test_mode_momentum_and_weights_are_left_as_they_were():
    network = nn.Sequential(nn.BatchNorm2d(1, momentum=0.3)).train()
    before = [p.clone() for p in network.parameters()]
    reestimate(network, [torch.randn(4, 1, 2, 2)])
    assert network.training
    assert network[0].training
    assert network[0].momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 2), nn.BatchNorm2d(2, track_running_stats=False)])
def test_networks_without_statistics_are_left_alone(norm):
    def never():
        raise AssertionError("no image is needed")
        yield

    reestimate(nn.Sequential(norm), never())


class RunningScale(nn.Module):
    """A user-defined norm with a statistic that is unknown to torch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.tensor(50.0))
        self.register_buffer("fixed", torch.tensor(2.0))

    def forward(self, x):
        if self.training:
            self.level.mul_(0.8).add_(0.2 * x.detach().abs().mean())  # pyright: ignore[reportCallIssue]
        return x / self.level * self.fixed


def test_layers_of_the_users_own_are_found_and_settle_by_their_own_rule():
    network = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Dropout(0.5))
    own = nn.Sequential(nn.Dropout(0.5), RunningScale())
    images = torch.rand(8, 1, 5, 5) + 1
    assert batch_norm.statistics(network, images) == {"0.running_mean", "0.running_var"}
    assert batch_norm.statistics(own, images) == {"1.level"}
    assert own[1].level == 50
    batch_norm.reestimate(network, [images] * 3)
    assert network[0].running_mean.item() == pytest.approx(images.mean().item(), rel=1e-4)  # pyright: ignore[reportCallIssue]
    batch_norm.reestimate(own, [images] * 60)
    assert own[1].level.item() == pytest.approx(images.mean().item(), rel=1e-3)  # pyright: ignore[reportCallIssue]
    assert own[1].fixed == 2
    assert all(module.training for module in network.modules())


def test_the_average_is_over_images_however_they_are_batched():
    images = torch.rand(10, 2, 3, 3)
    means = []
    for size in (10, 4):
        network = nn.BatchNorm2d(2)
        batch_norm.reestimate(network, images.split(size))
        means.append(network.running_mean)
    assert torch.allclose(*means, atol=1e-6)
    assert torch.allclose(means[0], images.mean(dim=(0, 2, 3)), atol=1e-6)


def test_watching_draws_nothing_from_the_random_state():
    network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1))
    before = torch.get_rng_state()
    batch_norm.reestimate(network, [torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))])
    assert torch.equal(torch.get_rng_state(), before)
