import copy
import itertools

import numpy as np
import pytest
import torch

from tests.training.optimisation.test_loop import train
from training import curve, fge, networks, swag
from training.config import ADAMW_SHARE
from training.errors import ConfigError
from training.fge import Config
from training.optimisation import hardware, loop, optimizers
from training.optimisation.loop import Leg
from training.optimisation.schedules import rate_of
from training.optimisation.steps import Between, OneNetwork
from training.runs import Run

OPTIONS = {
    "sgd": {"clip_norm": 0.5, "accumulate": 2, "ema": 0.9},
    "adamw": {"optimizer": "adamw", "clip_norm": 0.5, "layer_decay": 0.7, "ema": 0.9},
    "own": {"optimizer": "torch.optim:RAdam", "accumulate": 3},
}


class StoppedError(Exception):
    """Training was killed."""


def stopping(after):
    """Steps that stop in their `after`-th call."""

    class Stopping(OneNetwork):
        calls = 0

        def take(self, pull, step):
            type(self).calls += 1
            if type(self).calls == after:
                raise StoppedError
            return super().take(pull, step)

    return Stopping


@pytest.mark.parametrize("name", OPTIONS)
def test_stopped_and_resumed_every_optimizer_computes_the_same_bits(data, name):
    def legs(steps):
        return lambda run: [
            Leg("a", 8, lambda i: 0.01, steps=steps, collect=(8,)),
            Leg("b", 8, lambda i: 0.005, steps=steps, collect=(4, 8)),
        ]

    calm, calm_run = train(data, legs(OneNetwork), "calm", **OPTIONS[name])
    with pytest.raises(StoppedError):
        train(data, legs(stopping(11)), "stopped", **OPTIONS[name])
    resumed, run = train(data, legs(OneNetwork), "stopped", **OPTIONS[name])
    for one, other in zip(calm.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for file in ("00-000", "01-000", "01-001"):
        path = f"vertices/{file}.safetensors"
        assert (calm_run.folder / path).read_bytes() == (run.folder / path).read_bytes()


def test_the_average_is_that_of_the_weights_after_each_step(data):
    seen = []

    class Watching(OneNetwork):
        def take(self, pull, step):
            found = super().take(pull, step)
            seen.append(copy.deepcopy(dict(self._network.state_dict())))
            return found

    network, run = train(data, lambda run: [Leg("a", 6, lambda i: 0.05, steps=Watching, collect=(6,))], ema=0.8)
    from training.runs import load_state

    collected = load_state(run.vertex_file(0, 0))
    for name in collected:
        weights = np.array([0.8**5, *(0.2 * 0.8 ** (5 - k) for k in range(1, 6))])
        expected = sum(w * state[name].double() for w, state in zip(weights, seen, strict=True))
        assert collected[name].double().numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert any(not torch.allclose(collected[name], one) for name, one in network.state_dict().items())


def test_parts_of_a_batch_add_up_to_its_gradient(data):
    whole, _ = train(data, lambda run: [Leg("a", 4, lambda i: 0.05)], "whole")
    parts, _ = train(data, lambda run: [Leg("a", 4, lambda i: 0.05)], "parts", accumulate=3)  # 16 images in 6, 6 and 4
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_gradients_are_clipped_together():
    weights = [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    optimizers.clip(optimizer, 1.0)
    assert torch.cat([weight.grad for weight in weights]).norm() == pytest.approx(1.0, abs=1e-4)
    optimizers.clip(optimizer, None)


def test_earlier_layers_have_a_share_of_the_rate(data):
    config = Config(network="mlp", layer_decay=0.5)
    network = networks.build("mlp", 3, data.shape, {"hidden": 8, "layers": 2})
    named = dict(network.named_parameters())
    optimizer = optimizers.make(config, hardware.launch(config), [named], decays=True)
    optimizers.set_rate(optimizer, 0.08)
    rates = {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
    assert [rates[id(named[f"{layer}.weight"])] for layer in (1, 3, 5)] == pytest.approx([0.02, 0.04, 0.08])


def test_adamw_takes_torchs_step_with_decoupled_decay(data):
    config = {"optimizer": "adamw", "weight_decay": 0.1}
    found, _ = train(data, lambda run: [Leg("a", 1, lambda i: 0.01)], **config)
    loop.initialise(0)
    network = networks.build("mlp", 3, data.shape, {"hidden": 16})
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)
    from training.optimisation.seeds import Stream, derive

    rows = torch.randperm(64, generator=torch.Generator().manual_seed(derive(0, Stream.ORDER, 0, 0)))[:16]
    images = (data.train.images[rows] - 0.5) / 0.3
    torch.nn.functional.cross_entropy(network(images), data.train.labels[rows]).backward()
    optimizer.step()
    for one, other in zip(found.parameters(), network.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_bend_of_a_curve_moves_with_adamw_and_goes_on_after_a_stop(data):
    network = networks.build("mlp", 3, data.shape, {"hidden": 16})
    ends = []
    config = Config(network="mlp", network_options=("hidden=16",), batch_size=16, precision="32", optimizer="adamw")

    def leg(run, iterations):
        return Leg(
            "curve",
            iterations,
            lambda i: 0.01,
            steps=Between(curve.between(curve.Config(bends=1), ends)),
            collect=(iterations,),
        )

    def trained(folder, *lengths):
        with Run.open(folder, {}, {}, fresh=False) as run:
            if not ends:
                for seed in (1, 2):
                    torch.manual_seed(seed)
                    file = run.start_file(f"end-{seed}")
                    state = networks.build("mlp", 3, data.shape, {"hidden": 16}).state_dict()
                    from training.runs import save_state

                    save_state(file, state)
                    ends.append(file)
            for length in lengths:
                loop.train(config, hardware.launch(config), run, network, data, [leg(run, length)])
            return run.vertex_file(0, 0).read_bytes()

    calm = trained("calm", 8)
    assert trained("stopped", 4, 8) == calm


def test_the_default_rates_suit_the_optimizer():
    plain, adam = fge.Config(), fge.Config(optimizer="adamw")
    for rate in ("lr", "alpha_1", "alpha_2"):
        assert getattr(adam, rate) == pytest.approx(ADAMW_SHARE * getattr(plain, rate))
    assert fge.Config(optimizer="adamw", lr=3e-4).lr == 3e-4
    assert swag.Config(optimizer="adamw").swag_lr == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: fge.Config(accumulate=0), "--accumulate"),
        (lambda: fge.Config(clip_norm=0.0), "--clip-norm"),
        (lambda: curve.Config(ema=0.9), "--ema .* curve"),
        (lambda: fge.Config(layer_decay=0.0), "--layer-decay"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


def test_warm_up_and_cosine_shape_the_plain_schedule():
    warm = fge.Config(warmup=0.1)
    assert [rate_of(warm, i, 100) for i in (1, 5, 10, 20)] == pytest.approx([0.01, 0.05, 0.1, 0.1])
    cosine = fge.Config(schedule="cosine")
    rates = [rate_of(cosine, i, 100) for i in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.05)
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[-1] < 1e-4


def test_blocks_of_a_transformer_are_its_layers_and_what_follows_them_is_above():
    names = ["class_token", "conv_proj.weight", "encoder.pos_embedding", "encoder.layers.encoder_layer_0.ln_1.weight",
             "encoder.layers.encoder_layer_0.mlp.0.weight", "encoder.layers.encoder_layer_1.mlp.3.weight", "encoder.ln.weight", "heads.head.weight"]  # fmt: skip
    scales = optimizers._scales({name: torch.zeros(1) for name in names}, 0.5)
    assert [scales[name] for name in names] == [2.0**-k for k in (6, 5, 4, 3, 3, 2, 1, 0)]


def test_the_average_of_a_shared_weight_is_collected_under_each_of_its_names(data):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = (torch.nn.Linear(36, n) for n in (36, 36, 3))
            self.second.weight = self.first.weight

        def forward(self, images):
            return self.head(self.second(self.first(images.flatten(1)).relu()))

    from training.optimisation.steps import Training

    config = Config(batch_size=16, precision="32", ema=0.9)
    steps = OneNetwork(Training(config, hardware.launch(config), Tied(), data))
    from training.optimisation.steps import Step, pull_of

    for number in range(3):
        images, labels = data.train.images[:16], data.train.labels[:16]
        loss = pull_of(lambda i=images, t=labels: torch.nn.functional.cross_entropy(steps._network(i), t))
        steps.take(loss, Step(number + 1, 0.1, np.random.default_rng(0), 64))
    (found,) = steps.collected()
    assert torch.equal(found["first.weight"], found["second.weight"])
    assert not torch.equal(found["first.weight"], steps._network.first.weight)
