import pytest
import torch
from torch import nn

from training.batch_norm import reestimate


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
