import pytest
import torch
from torch import nn

from training.networks import layout

IMAGES = torch.rand(2, 3, 8, 8)


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.conv(images).view(len(images), -1)


def test_weights_carry_the_layout():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    assert layout.of(network) == torch.contiguous_format
    layout.convert(network, torch.channels_last)
    assert layout.of(network) == torch.channels_last
    assert layout.of(nn.Linear(3, 3)) == torch.contiguous_format


def test_channels_last_is_taken_where_the_network_runs_in_it():
    runs, views = nn.Sequential(nn.Conv2d(3, 4, 3)), Views()
    for network in (runs, views):
        layout.prefer_channels_last(network, IMAGES)
        assert network.training
    assert layout.of(runs) == torch.channels_last
    assert layout.of(views) == torch.contiguous_format
    assert views(IMAGES).shape == (2, 144)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_brought_into_a_layout_whatever_they_were_made_of(channels):
    images = torch.rand(2, 8, 8, channels).permute(0, 3, 1, 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        arranged = layout.arrange(images, memory_format)
        assert torch.equal(arranged, images)
        assert arranged.is_contiguous(memory_format=memory_format)
    assert layout.arrange(images, torch.contiguous_format).stride() == (64 * channels, 64, 8, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_convolution_of_arranged_images_can_be_viewed(channels):
    images = torch.rand(2, 8, 8, channels).permute(0, 3, 1, 2)
    features = nn.Conv2d(channels, 4, 3)(layout.arrange(images, torch.contiguous_format))
    assert features.view(2, -1).shape == (2, 144)


def test_a_network_whose_gradient_torch_computes_wrongly_in_channels_last_stays_contiguous():
    few, enough = (nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 16, 1, stride=2)) for c in (4, layout.SAFE_CHANNELS))
    for network in (few, enough):
        layout.convert(network, torch.channels_last)
    assert layout.of(few) == torch.contiguous_format
    assert layout.of(enough) == torch.channels_last
