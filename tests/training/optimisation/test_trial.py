import contextlib
import dataclasses
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

from models_store.store import Store
from tests.training.conftest import make_data
from training import fge, logger, networks
from training.errors import ConfigError, ExportError, NetworkError
from training.members.export import Exporter
from training.optimisation import hardware, trial

SHAPE = (1, 8, 8)
DATA = make_data(shape=SHAPE)


def build(name):
    torch.manual_seed(0)
    return networks.build(f"tests.training.other_networks:{name}", 3, SHAPE, {})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("minus_mean", r"alone and with other images.*forward of Network, before its layer 'head'"),
        ("by_largest", r"alone and with other images.*forward of Network, before its layer 'head'"),
        ("untracked_norm", r"'norm' \(BatchNorm2d\).*track_running_stats=True"),
        ("norm_in_training", r"forward of Network, before its layer 'head'"),
        ("attention_over_batch", r"'attention' \(MultiheadAttention\).*batch_first=True"),
        ("squeezing", r"one image with an array \(3,\).*squeeze"),
        ("softmax", "ends in softmax"),
        ("settling", "buffer 'level' in eval mode"),
        ("without_parameters", "nothing to train"),
        ("writes_to_input", "writes into the images"),
    ],
)
def test_networks_that_could_not_be_served_are_refused_with_the_reason(name, told):
    with pytest.raises(NetworkError, match=told):
        trial.check(build(name), DATA, Exporter(DATA.input))


def test_a_sigmoid_is_seen_in_the_exported_graph():
    with pytest.raises(NetworkError, match="sigmoid"):
        trial.check(build("sigmoid"), DATA, Exporter(DATA.input))


def test_a_network_whose_head_begins_as_zeros_is_seen_through():
    network = build("minus_mean")
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    with pytest.raises(NetworkError, match="alone and with other images"):
        trial.check(network, DATA, Exporter(DATA.input))
    assert not network.head.weight.any()


def test_log_probabilities_pass_and_the_exporter_is_ready_for_members():
    exporter = Exporter(DATA.input)
    network = build("log_softmax")
    trial.check(network, DATA, exporter)
    assert exporter._template is not None


def state_of_everything(network):
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return tensors, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()


def test_a_trial_leaves_network_and_random_state_as_they_were():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))
    before = state_of_everything(network)
    trial.check(network, DATA, Exporter(DATA.input))
    config = fge.Config(precision="32")
    assert trial.fit(config, hardware.launch(config), network, DATA) is config
    after = state_of_everything(network)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]
    assert (before[3] == after[3]).all()
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def fitted(name, **options):
    config = fge.Config(network=f"tests.training.other_networks:{name}", **options)
    fabric = hardware.launch(config)
    if options.get("precision", "auto") == "auto":  # like hardware that computes in bf16
        reduced = hardware.launch(dataclasses.replace(config, precision="bf16"))
        fabric._precision = fabric.strategy.precision = reduced._precision
    with capture() as lines:
        return trial.fit(config, fabric, build(name), DATA), hardware.is_reduced(fabric), lines


@contextlib.contextmanager
def capture():
    """The lines that are logged meanwhile."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_a_network_that_views_what_a_convolution_gave_is_trained_in_the_usual_layout():
    config, _, (line,) = fitted("viewing", precision="32")
    assert not config.channels_last
    assert "channels-last" in line
    assert "view size" in line
    config, _, lines = fitted("viewing", precision="32", channels_last=False)
    assert not config.channels_last
    assert lines == []


def test_a_network_that_lacks_bf16_is_trained_in_float32_unless_bf16_was_asked_for():
    config, reduced, (line,) = fitted("antialiased")
    assert config.channels_last
    assert not reduced
    assert "bfloat16" in line
    with pytest.raises(NetworkError, match="leave out --precision bf16"):
        fitted("antialiased", precision="bf16")


def breaking(logits, labels):
    raise TypeError("one argument too few")


def test_a_loss_that_fails_is_named_instead_of_the_network():
    own = "tests.training.optimisation.test_trial:breaking"
    with pytest.raises(ConfigError, match=f"--loss {own} fails .*one argument too few"):
        fitted("viewing", precision="32", channels_last=False, loss=own)


def test_a_network_with_statistics_whose_forward_fails_in_training_mode_is_refused_with_the_reason():
    class Failing(nn.Sequential):
        def forward(self, images):  # pyright: ignore[reportIncompatibleMethodOverride]
            if self.training:
                raise RuntimeError("pooling region is empty")
            return super().forward(images)

    channels, height, width = DATA.shape
    network = Failing(nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(channels * height * width, len(DATA.classes)))
    with pytest.raises(NetworkError, match="fails in training mode on 8 images: RuntimeError: pooling region"):
        trial.check(network, DATA, Exporter(DATA.input))


def two_losses(logits, labels):
    return sum(nn.functional.cross_entropy(one, labels) for one in logits)


def test_auxiliary_outputs_need_a_loss_that_knows_them():
    with pytest.raises(NetworkError, match=r"tuple for 2 images.*--loss"):
        fitted("auxiliary", precision="32")
    own = "tests.training.optimisation.test_trial:two_losses"
    assert fitted("auxiliary", precision="32", loss=own)[0].loss == own


@pytest.mark.parametrize("name", ["squeezing", "looping", "auxiliary"])
def test_what_cannot_be_published_is_refused_before_any_epoch(name, capsys):
    config = fge.Config(
        network=f"tests.training.other_networks:{name}", epochs=2, pretrain=0.5, members=1, limit=300, name="n"
    )
    with pytest.raises((NetworkError, ExportError)):
        fge.run(config)
    assert "epoch" not in capsys.readouterr().out
    assert Store().names() == []


def test_a_network_with_views_is_published_without_channels_last(capsys):
    config = fge.Config(
        network="tests.training.other_networks:viewing", epochs=2, pretrain=0.5, members=1, limit=300, name="n", precision="32"
    )  # fmt: skip
    assert fge.run(config).manifest.members
    assert "channels-last" in capsys.readouterr().out
