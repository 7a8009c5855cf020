import csv
import dataclasses

import pytest
import torch

from tests.training.conftest import make_data
from training import curve, networks, pipeline
from training.curve import between
from training.errors import ConfigError, DeviceMemoryError, DivergenceError
from training.fge import Config
from training.optimisation import hardware, loop
from training.optimisation.loop import Leg
from training.optimisation.seeds import Stream, derive
from training.optimisation.steps import Between, OneNetwork
from training.runs import Run, load_state


def train(data, legs_of, folder="one", **options):
    config = Config(network="mlp", network_options=("hidden=16",), batch_size=16, precision="32", **options)
    with Run.open(folder, {}, {}, fresh=False) as run:
        loop.initialise(config.seed)
        network = networks.build(config.network, 3, data.shape, config.network_kwargs())
        loop.train(config, hardware.launch(config), run, network, data, legs_of(run))
        return network, run


def plain(iterations, rate=0.05, **more):
    return lambda run: [Leg("plain", iterations, lambda i: rate, **more)]


def test_a_step_is_sgds_step(data):
    """Compared with an explicit loop over torch's SGD: same order, same batches, no augmentation."""
    config = Config(network="mlp", network_options=("hidden=16",), batch_size=16, precision="32")
    found, _ = train(data, plain(3))
    loop.initialise(config.seed)
    network = networks.build("mlp", 3, data.shape, {"hidden": 16})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=config.weight_decay)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(derive(0, Stream.ORDER, 0, 0)))
    for rows in order.split(16)[:3]:
        optimizer.zero_grad()
        logits = network((data.train.images[rows] - 0.5) / 0.3)
        torch.nn.functional.cross_entropy(logits, data.train.labels[rows]).backward()
        optimizer.step()
    for a, b in zip(found.parameters(), network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_it_learns():
    data = make_data(count=512)
    network, _ = train(data, plain(32 * 15))
    with torch.no_grad():
        right = network.eval()((data.test.images - 0.5) / 0.3).argmax(1) == data.test.labels
    assert right.float().mean() > 0.8


def test_the_rate_is_asked_for_every_iteration_in_order(data):
    asked = []

    def rate(i):
        asked.append(i)
        return 0.01

    train(data, lambda run: [Leg("plain", 6, rate)])
    # 4 iterations per epoch, and one more call after each epoch, for its log line.
    assert asked == [1, 2, 3, 4, 4, 5, 6, 6]


def test_weights_are_collected_after_their_iteration(data):
    _, run = train(data, plain(6, collect=(2, 6)), "both")
    stopped, _ = train(data, plain(2), "stopped")
    collected = load_state(run.vertex_file(0, 0))
    assert all(torch.equal(collected[k], v) for k, v in stopped.state_dict().items())
    assert run.vertex_file(0, 1).exists()
    assert not run.vertex_file(0, 2).exists()


def test_the_seed_repeats_a_run_bit_for_bit_and_another_seed_does_not(data):
    states = [
        train(data, plain(8), folder, seed=seed)[0].state_dict() for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_a_run_that_is_taken_up_again_is_bit_identical_to_an_undisturbed_one(data):
    def legs(run):
        kept = run.start_file("epoch-2")
        return [
            Leg("first", 8, lambda i: 0.05, keep=((2, kept),)),
            Leg("second", 8, lambda i: 0.02, start=kept, collect=(2, 6)),
        ]

    whole, whole_run = train(data, legs, "whole")
    stopped = ValueError("killed")
    calls = 0

    def dying(logits, labels):
        nonlocal calls
        calls += 1
        if calls in (6, 16):  # within the second epoch, and within the second leg
            raise stopped
        return torch.nn.functional.cross_entropy(logits, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "loss_of", lambda config, data: dying)
        for _ in range(2):
            with pytest.raises(ValueError, match="killed"):
                train(data, legs, "parts")
        parts, parts_run = train(data, legs, "parts")
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    for number in (0, 1):
        a, b = (load_state(r.vertex_file(1, number)) for r in (whole_run, parts_run))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_each_collection_of_each_free_vertex_is_a_file_of_its_own(data):
    def legs(run):
        ends = [run.vertex_file(0, 0), run.vertex_file(1, 0)]
        span = between(curve.Config(bends=2), ends)
        plain = [Leg(f"end {i}", 2, lambda i: 0.05, start=None, collect=(2,)) for i in range(2)]
        return [*plain, Leg("bends", 4, lambda i: 0.05, collect=(2, 4), steps=Between(span), weight_sets=2)]

    _, run = train(data, legs)
    files = [run.vertex_file(2, number) for number in range(4)]
    assert sorted((run.folder / "vertices").glob("02-*")) == files
    assert len({file.read_bytes() for file in files}) == 4
    label, found = zip(*((origin.leg, file) for file, origin in pipeline.collected(run, legs(run), 4)), strict=True)
    assert label == ("end 0", "end 1", *["bends"] * 4)
    assert list(found[2:]) == files


def test_a_leg_begins_with_the_weights_of_a_collected_vertex_and_without_momentum(data):
    def legs(run):
        return [
            Leg("a", 4, lambda i: 0.05, collect=(4,)),
            Leg("b", 4, lambda i: 0.05, start=run.vertex_file(0, 0), collect=(1,)),
        ]

    _, run = train(data, legs)
    begun, found = (load_state(run.vertex_file(leg, 0)) for leg in (0, 1))
    network = networks.build("mlp", 3, data.shape, {"hidden": 16})
    network.load_state_dict(begun)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=Config().weight_decay)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(derive(0, Stream.ORDER, 1, 0)))[:16]
    torch.nn.functional.cross_entropy(
        network((data.train.images[rows] - 0.5) / 0.3), data.train.labels[rows]
    ).backward()
    optimizer.step()
    for name, tensor in network.state_dict().items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


def test_a_leg_without_a_start_goes_on_with_weights_and_momentum_of_the_one_before(data):
    one, _ = train(data, lambda run: [Leg("a", 4, lambda i: 0.05)], "one")
    handed = []

    class Noting(OneNetwork):
        def restore(self, state):
            handed.append({name: tensor.clone() for name, tensor in state.items()})
            super().restore(state)

    train(data, lambda run: [Leg(name, 4, lambda i: 0.05, steps=Noting) for name in "ab"], "noting")
    (state,) = handed
    assert all(torch.equal(state[f"network.{name}"], tensor) for name, tensor in one.state_dict().items())
    assert any(name.startswith("momentum.") and tensor.abs().sum() > 0 for name, tensor in state.items())


def test_a_step_is_told_its_iteration_rate_generator_and_the_number_of_images(data):
    told = []

    class Telling(OneNetwork):
        def take(self, pull, step):
            told.append((step.iteration, step.rate, step.images, step.generator.random()))
            return super().take(pull, step)

    train(data, lambda run: [Leg("a", 6, lambda i: 0.01 * i, steps=Telling)])
    assert [(i, images) for i, _, images, _ in told] == [(i, 64) for i in range(1, 7)]
    assert [rate for _, rate, _, _ in told] == [0.01 * i for i in range(1, 7)]
    assert len({drawn for *_, drawn in told}) == 6


def test_a_leg_begins_with_the_weights_and_the_momentum_of_its_start(data):
    def joined(run):
        kept = run.start_file("epoch-1")
        return [Leg("a", 4, lambda i: 0.05, keep=((1, kept),)), Leg("b", 4, lambda i: 0.05, start=kept)]

    def after_detour(run):
        kept = run.start_file("epoch-1")
        first = Leg("a", 4, lambda i: 0.05, keep=((1, kept),))
        return [first, Leg("b", 4, lambda i: 0.05, start=kept)]

    assert all(
        torch.equal(a, b)
        for a, b in zip(
            train(data, joined, "j")[0].parameters(), train(data, after_detour, "d")[0].parameters(), strict=True
        )
    )
    kept = load_state(train(data, joined, "j")[1].start_file("epoch-1"))
    assert any(name.startswith("momentum.") for name in kept)


@pytest.mark.parametrize("rate", [1e6, float("nan")])
def test_a_diverging_loss_is_told(data, rate):
    with pytest.raises(DivergenceError, match="--lr"):
        train(data, plain(40, rate))


def test_a_loss_that_becomes_nan_names_the_epoch_and_the_step(data):
    rates = [0.01] * 6 + [float("nan")] + [0.01] * 40  # the weights become NaN in step 7, the loss in step 8
    with pytest.raises(DivergenceError, match=r"in epoch 2 of plain, in step 4 of 4, at a learning rate of 0\.01"):
        train(data, lambda run: [Leg("plain", 40, lambda i: rates[i - 1])])


def hungry_loss(logits, labels):
    """As on a GPU that holds 5 images."""
    if len(logits) > 5:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return torch.nn.functional.cross_entropy(logits, labels)


def starving_loss(logits, labels):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_batch_that_does_not_fit_is_told_with_sizes_that_do(data):
    own = {"loss": f"{__name__}:hungry_loss"}
    with pytest.raises(
        DeviceMemoryError, match=r"does not hold 16 images at once; 4 were tried.*--accumulate 4 .*--batch-size 4 "
    ):
        train(data, plain(8), **own)
    train(data, plain(8), folder="parts", accumulate=4, **own)  # what it advises works
    with pytest.raises(DeviceMemoryError, match="does not hold 8 images at once; 4 were tried"):
        train(data, plain(8), folder="halves", accumulate=2, **own)
    with pytest.raises(DeviceMemoryError, match="does not hold one image"):
        train(data, plain(8), folder="none", loss=f"{__name__}:starving_loss")


def own_loss(logits, labels):
    return torch.nn.functional.multi_margin_loss(logits, labels)


def test_the_loss_can_be_the_users(data):
    default, _ = train(data, plain(4), "default")
    own, _ = train(data, plain(4), "own", loss="tests.training.optimisation.test_loop:own_loss")
    assert any(not torch.equal(a, b) for a, b in zip(default.parameters(), own.parameters(), strict=True))
    with pytest.raises(ConfigError, match="must be a function"):
        train(data, plain(4), "wrong", loss="tests.training.optimisation.test_loop:__name__")


def test_weighted_classes_pull_the_same_in_one_part_and_in_several(data):
    once, _ = train(data, plain(4), "once", class_weights=("1", "5", "2"))
    parts, _ = train(data, plain(4), "parts", class_weights=("1", "5", "2"), accumulate=4)
    default, _ = train(data, plain(4), "default")
    for one, other, without in zip(once.parameters(), parts.parameters(), default.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert not torch.equal(one, without)


def test_class_weights_scale_the_loss_of_each_row(data):
    logits, labels = torch.randn(64, 3), data.train.labels
    config = Config(class_weights=("balanced",), label_smoothing=0.1)
    counts = torch.bincount(labels, minlength=3)
    own = torch.stack([torch.nn.functional.cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(64)])
    expected = (own * (64 / (3 * counts))[labels]).mean()
    torch.testing.assert_close(
        loop.loss_of(dataclasses.replace(config, label_smoothing=0.0), data)(logits, labels), expected
    )
    shares = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(loop.loss_of(config, data)(logits, shares), loop.loss_of(config, data)(logits, labels))


def test_an_epoch_of_balanced_rows_has_each_class_equally_often(data):
    labels = torch.tensor([0] * 56 + [1] * 6 + [2] * 2)
    rare = dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))
    config = Config(draw="balanced")
    orders = [loop.order_of(config, rare, torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert {len(order) for order in orders} == {64}
    shares = torch.bincount(labels[torch.cat(orders)], minlength=3) / (60 * 64)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.04)
    with pytest.raises(ConfigError, match="gives no `weights`"):
        loop.order_of(Config(draw="weights"), rare, torch.Generator())
    weighted = dataclasses.replace(rare, weights=torch.arange(64.0))
    assert 0 not in loop.order_of(Config(draw="weights"), weighted, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "option", [{"nesterov": True}, {"label_smoothing": 0.2}, {"weight_decay": 0.1}, {"momentum": 0.5}]
)
def test_every_option_of_sgd_reaches_it(data, option):
    default, _ = train(data, plain(8), "default")
    changed, _ = train(data, plain(8), "changed", **option)
    assert any(not torch.equal(a, b) for a, b in zip(default.parameters(), changed.parameters(), strict=True))


def test_bf16_and_channels_last_train(data):
    config = Config(network="preresnet8", batch_size=16, precision="bf16")
    network = networks.build("preresnet8", 3, data.shape, {"width": 0.25})
    with Run.open("bf16", {}, {}, fresh=False) as run:
        loop.train(config, hardware.launch(config), run, network, data, [Leg("plain", 4, lambda i: 0.05)])
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in network.parameters())


def test_a_row_an_epoch_is_logged(data):
    _, run = train(data, plain(12), log="csv")
    (file,) = run.folder.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert len(rows) == 3
    assert {"rate", "train_loss", "validation_accuracy", "validation_nll"} <= set(rows[0])


def test_tensorboard_is_written(data):
    _, run = train(data, plain(4), log="tensorboard")
    assert list(run.folder.rglob("events.out.tfevents*"))


def test_an_epoch_is_whole_batches(data):
    assert loop.iterations_per_epoch(data, 16) == 4
    assert loop.iterations_per_epoch(data, 60) == 1
    assert loop.iterations_per_epoch(dataclasses.replace(data, train=data.train.take(torch.arange(5))), 16) == 1
