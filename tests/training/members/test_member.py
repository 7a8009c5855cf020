import numpy as np
import pytest
import torch
from torch import nn

from models_store.graphs.runtime import MemberSession
from tests.training.conftest import make_data
from training import networks
from training.data import as_arrays
from training.errors import ExportError
from training.members import member
from training.members.export import Exporter

CPU = torch.device("cpu")


def test_a_member_has_the_batch_norm_of_its_own_weights_and_answers_as_its_file_does(data):
    torch.manual_seed(0)
    network = networks.build("preresnet8", 3, data.shape, {"width": 0.25})
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    weights["bn.running_mean"] += 100  # as if collected at other weights
    made = member.make(network, weights, data, bn_images=64, device=CPU, exporter=Exporter(data.input))
    assert abs(made.state["bn.running_mean"]).max() < 50
    assert torch.equal(made.state["head.weight"], weights["head.weight"])
    images, _ = as_arrays(data.validation)
    network.load_state_dict(made.state)
    with torch.no_grad():
        expected = network.eval()((torch.from_numpy(images) - 0.5) / 0.3).numpy()
    assert made.validation_logits == pytest.approx(expected, abs=1e-4)
    assert MemberSession(made.onnx).logits(images) == pytest.approx(expected, abs=1e-4)


def test_a_member_that_mixes_the_images_of_a_batch_is_refused(data):
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3, track_running_stats=False))
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ExportError, match="alone and with other images"):
        member.make(network, weights, data, 32, CPU, Exporter(data.input))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_statistics_are_re_estimated_in_the_layout_of_the_weights(data, memory_format):
    seen = []

    class Watching(nn.Module):
        def forward(self, images):
            seen.append(images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous())
            return images

    colour = make_data(shape=(3, 6, 6))
    network = nn.Sequential(Watching(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).to(memory_format=memory_format)
    member.settle(network, colour, 16, CPU)
    assert set(seen) == {memory_format == torch.channels_last}


def test_making_a_member_twice_gives_the_same_bits(data):
    network = networks.build("preresnet8", 3, data.shape, {"width": 0.25})
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    first, second = (member.make(network, weights, data, 32, CPU, Exporter(data.input)) for _ in range(2))
    assert first.onnx == second.onnx
    assert all(torch.equal(first.state[k], second.state[k]) for k in first.state)
    assert np.array_equal(first.validation_logits, second.validation_logits)
