import pytest
import torch
from torch import nn

from training import networks
from training.errors import ImportStringError, NetworkError

SMALL = {"width": 0.125}


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("spec", "options", "shape"),
    [
        ("mlp", {}, (1, 8, 8)),
        ("mlp", {"hidden": 7, "layers": 3}, (3, 5, 4)),
        ("vgg16", SMALL, (3, 32, 32)),
        ("vgg16-bn", SMALL, (1, 28, 28)),
        ("vgg16", SMALL, (1, 8, 8)),
        ("preresnet8", {}, (1, 8, 8)),
        ("preresnet20", {"width": 0.5}, (3, 32, 32)),
        ("preresnet11", {"bottleneck": True}, (1, 28, 28)),
        ("wrn-10-2", {}, (3, 32, 32)),
        ("torchvision:resnet18", {}, (1, 28, 28)),
        ("torchvision:mobilenet_v3_small", {}, (3, 32, 32)),
    ],
)
def test_networks_give_logits_and_gradients_for_every_parameter(spec, options, shape):
    network = networks.build(spec, 7, shape, options)
    logits = network(torch.rand(4, *shape))
    assert logits.shape == (4, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    ("spec", "convolutions"), [("preresnet8", 7), ("preresnet20", 19), ("preresnet110", 109), ("preresnet164", 163)]
)
def test_the_depth_counts_convolutions_and_the_head(spec, convolutions):
    network = networks.build(spec, 10, (3, 16, 16), {})
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in network.modules()) <= convolutions
    main_path = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in name]
    assert len(main_path) == convolutions


def test_sizes_are_those_of_the_papers():
    assert count(networks.build("preresnet164", 10, (3, 32, 32), {})) == pytest.approx(1.70e6, rel=0.01)
    assert count(networks.build("wrn-28-10", 10, (3, 32, 32), {})) == pytest.approx(36.5e6, rel=0.01)
    assert count(networks.build("vgg16", 10, (3, 32, 32), {})) == pytest.approx(15.2e6, rel=0.01)


def test_the_seed_decides_initial_weights():
    def first(seed):
        torch.manual_seed(seed)
        return next(networks.build("preresnet8", 10, (1, 8, 8), {}).parameters())

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("resnet50", "Unknown network"),
        ("preresnet9", "does not exist"),
        ("preresnet2", "does not exist"),
        ("wrn-27-10", "does not exist"),
        ("torchvision:nothing", "no classifier"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier"),
    ],
)
def test_unknown_networks_are_named(spec, told):
    with pytest.raises(NetworkError, match=told):
        networks.build(spec, 10, (3, 32, 32), {})


def test_wrong_options_and_too_small_images_are_told():
    with pytest.raises(NetworkError, match="cannot be built"):
        networks.build("mlp", 10, (1, 8, 8), {"depth": 3})
    with pytest.raises(NetworkError, match="larger images"):
        networks.build("torchvision:alexnet", 10, (3, 8, 8), {})


@pytest.mark.parametrize("spec", ["nowhere:make", "training.networks:nothing", "training.networks:"])
def test_import_strings_that_lead_nowhere_are_told(spec):
    with pytest.raises(ImportStringError):
        networks.build(spec, 10, (1, 8, 8), {})


def no_logits(num_classes, input_shape):
    return nn.Flatten()


def test_a_users_factory_that_gives_no_logits_is_told():
    with pytest.raises(NetworkError, match=r"must give logits \(2, 10\)"):
        networks.build("tests.training.networks.test_networks:no_logits", 10, (1, 8, 8), {})
