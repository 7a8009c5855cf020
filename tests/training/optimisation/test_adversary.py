import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from training import data, independent, networks
from training.errors import ConfigError
from training.independent import Config
from training.optimisation.adversary import Adversary

MEAN, STD = torch.full((1, 2, 1, 1), 0.3), torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)


def images(count=16, seed=0):
    return torch.rand(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 3))


def attacked(epsilon=0.1, steps=5, share=1.0, network=None):
    clean, labels = images(), torch.arange(16) % 3
    adversary = Adversary(epsilon, steps, share, MEAN, STD)
    moved = adversary.attack(network or linear(), functional.cross_entropy, (clean - MEAN) / STD, labels)
    return clean, labels, moved * STD + MEAN


def test_no_pixel_goes_further_than_allowed_or_leaves_its_range():
    clean, _, moved = attacked()
    assert (moved - clean).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6


def test_of_two_classes_on_a_linear_network_it_finds_the_worst_image_there_is():
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(50, 2, bias=False))
    clean, labels = images(), torch.arange(16) % 2
    moved = Adversary(0.05, 20, 1.0, MEAN, STD).attack(network, functional.cross_entropy, (clean - MEAN) / STD, labels)
    weight = network[1].weight.detach()  # pyright: ignore[reportCallIssue]
    downhill = torch.sign(weight[1 - labels] - weight[labels]).view_as(clean)
    worst = (clean + 0.05 * downhill).clamp(0, 1)
    assert torch.allclose(moved * STD + MEAN, worst, atol=1e-5)


def test_the_rest_of_the_batch_stays_as_it_is():
    clean, _, moved = attacked(share=0.25)
    assert torch.allclose(moved[4:], clean[4:], atol=1e-6)
    assert ((moved - clean).abs().flatten(1).max(1).values[:4] > 0.01).all()


def test_the_networks_own_gradients_are_left_alone():
    network = linear()
    attacked(network=network)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_trained_so_resists_more_and_its_cost_is_told():
    found = {}
    for name, options in {"plain": {}, "hard": {"adversarial_epsilon": 0.1, "adversarial_steps": 3}}.items():
        version = independent.run(Config(name=name, network="mlp", epochs=15, runs=1, lr=0.05, **options))
        assert version.manifest.provenance.epochs_spent == pytest.approx(15 * (4 if options else 1))
        network = networks.build("mlp", 10, (1, 8, 8), {})
        network.load_state_dict(load_file(version.folder / "weights/000.safetensors"))
        splits = data.load(Config().data_options())
        clean, labels = (torch.from_numpy(one) for one in data.as_arrays(splits.test))
        mean, std = (torch.tensor(value).view(1, 1, 1, 1) for value in (splits.mean, splits.std))
        adversary = Adversary(0.1, 10, 1.0, mean, std)
        moved = adversary.attack(network.eval(), functional.cross_entropy, (clean - mean) / std, labels)
        found[name] = float((network(moved).argmax(1) == labels).float().mean())
    assert found["hard"] > found["plain"] + 0.1


@pytest.mark.parametrize(
    "wrong",
    [{"adversarial_epsilon": 1.0}, {"adversarial_epsilon": -0.1}, {"adversarial_steps": 0}, {"adversarial_share": 0.0}],
)
def test_what_cannot_be_carried_out_is_told(wrong):
    with pytest.raises(ConfigError, match="--adversarial-epsilon"):
        Config(**wrong)


def test_runs_from_before_there_was_an_adversary_are_still_found():
    assert not [key for key in Config().deciding() if "adversarial" in key]
    assert Config(adversarial_epsilon=0.1).deciding()["adversarial_epsilon"] == 0.1
