import pytest
import torch
from torch import nn

from training.networks.row_mixing import first_mixing

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Centred(nn.Module):
    def forward(self, features):
        return features - features.mean(dim=0)


class Recurrent(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.rows = nn.GRU(8, 6, batch_first=batch_first)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        return self.head(self.rows(images[:, 0])[0][:, -1])


class AfterLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 3)

    def forward(self, images):
        return self.inner(images.flatten(1)).softmax(dim=0)


def stacked(*layers):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), *layers, nn.Flatten(), nn.Linear(72, 3)).eval()


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (stacked(nn.BatchNorm2d(2, track_running_stats=False)), "'2' (BatchNorm2d): it normalises by the batch"),
        (stacked(nn.ReLU(), nn.Sequential(Centred())), "'3.0' (Centred)"),
        (Recurrent(batch_first=False), "'rows' (GRU): it takes the batch for the sequence"),
        (AfterLayers(), "forward of AfterLayers, after its layers"),
        (stacked(nn.ReLU()), None),
        (Recurrent(batch_first=True), None),
    ],
)
def test_the_first_layer_that_mixes_images_is_named(network, told):
    found = first_mixing(network.eval(), IMAGES)
    assert (found is None) if told is None else (told in found)
