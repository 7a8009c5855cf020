import numpy as np
import pytest
import torch

from models_store.runtime import MemberSession
from training import member, networks
from training.data import as_arrays
from training.export import Exporter

CPU = torch.device("cpu")


def test_a_member_has_the_batch_norm_of_its_own_weights_and_answers_as_its_file_does(data):
    torch.manual_seed(0)
    network = networks.build("preresnet8", 3, data.shape, {"width": 0.25})
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    weights["bn.running_mean"] += 100  # gathered somewhere else
    made = member.make(network, weights, data, bn_images=64, device=CPU, exporter=Exporter(data.shape))
    assert abs(made.state["bn.running_mean"]).max() < 50
    assert torch.equal(made.state["head.weight"], weights["head.weight"])
    images, _ = as_arrays(data.validation)
    network.load_state_dict(made.state)
    with torch.no_grad():
        expected = network.eval()((torch.from_numpy(images) - 0.5) / 0.3).numpy()
    assert made.validation_logits == pytest.approx(expected, abs=1e-4)
    assert MemberSession(made.onnx).logits(images) == pytest.approx(expected, abs=1e-4)


def test_making_a_member_twice_gives_the_same_bits(data):
    network = networks.build("preresnet8", 3, data.shape, {"width": 0.25})
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    first, second = (member.make(network, weights, data, 32, CPU, Exporter(data.shape)) for _ in range(2))
    assert first.onnx == second.onnx
    assert all(torch.equal(first.state[k], second.state[k]) for k in first.state)
    assert np.array_equal(first.validation_logits, second.validation_logits)
