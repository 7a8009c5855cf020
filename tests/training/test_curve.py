import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models_store.bank import Bank
from models_store.graphs.runtime import MemberSession
from models_store.store import Store
from models_store.uncertainty import softmax
from tests.training.members import test_export
from training import curve, data, independent, networks
from training.curve import Config
from training.errors import CheckpointError, ConfigError
from training.runs import Run

SMALL = {"network": "preresnet8", "network_options": ("width=0.25",), "batch_size": 64, "limit": 640, "epochs": 2}


def plan(steps=10, **options):
    config = Config(**options)
    with Run.open("plan", {}, {}, fresh=True) as run:
        return curve.plan(config, run, steps)


def test_two_ends_of_different_initial_weights_and_the_curve_between_them():
    planned = plan(epochs=4, end_epochs=3, bends=2)
    first, second, bends = planned.legs
    assert (first.start.stem, second.start.stem) == ("fresh-0", "fresh-1")
    assert [leg.iterations for leg in planned.legs] == [30, 30, 40]
    assert bends.steps.span.vertices == (planned.vertices[0][0], None, None, planned.vertices[-1][0])
    assert planned.points.components == [[0, 1, 2, 3]]
    assert planned.points.members(None).shape == (6, 4)
    assert planned.points.bank(None).shape == (256, 4)


def test_runs_are_curves_of_their_own_that_share_bank_and_members():
    planned = plan(runs=2, bank=5, members=3)
    assert len(planned.legs) == 6
    assert planned.points.components == [[0, 1, 2], [3, 4, 5]]
    assert planned.points.members(None).shape == (6, 6)
    assert planned.points.bank(None)[:3, 3:].sum() == 0
    assert planned.points.bank(None)[3:, :3].sum() == 0


def test_a_segment_is_not_trained():
    planned = plan(shape="segment", bank=0)
    assert len(planned.legs) == 2
    assert planned.points.bank(None).shape == (0, 2)


def test_points_of_a_step_are_uniform_and_cost_what_they_cost():
    from scipy.stats import kstest

    (*_, leg) = plan(points_per_step=4).legs
    assert leg.passes == 4
    generator = np.random.default_rng(0)
    drawn = np.concatenate([leg.steps.span.draw(generator, None) for _ in range(500)])
    # The last coefficient of a quadratic Bezier curve is t².
    assert kstest(np.sqrt(drawn[:, 2]), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"endpoints": ("a",)}, "two networks"),
        ({"endpoints": ("a", "b"), "runs": 2}, "one curve"),
        ({"bends": 0}, "--shape segment"),
        ({"members": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_carried_out_is_told(options, told):
    with pytest.raises(ConfigError, match=told):
        Config(**options)


def test_a_curve_is_published_with_a_bank_whose_points_are_the_networks_of_the_curve(capsys):
    ends = independent.run(independent.Config(name="ends", runs=2, **SMALL))
    version = curve.run(Config(name="c", endpoints=("ends/0", "ends@1/1"), bends=2, bank=9, members=3, **SMALL))
    assert "validation images were set aside" not in capsys.readouterr().out  # the ends were trained on this very split
    Store().verify(version)
    manifest = version.manifest
    assert manifest.members[0].origin.coefficients == [1, 0, 0, 0]
    assert manifest.geometry.shape == "bezier"
    assert manifest.bank.points == 9
    # The ends equal the given networks, including the statistics, which are re-estimated on the same images.
    for member, end in ((0, 0), (2, 1)):
        given, found = (
            load_file(v.folder / f"weights/{i:03d}.safetensors") for v, i in ((ends, end), (version, member))
        )
        assert all(torch.equal(given[name], tensor) for name, tensor in found.items())
    bank = Bank.load(version.folder / "bank")
    session = {p: MemberSession(bank.template, weights=bank.weights(p)) for p in (0, 3, 4, 8)}
    splits = data.load(Config(**SMALL).data_options())
    images, labels = data.as_arrays(splits.validation)
    # Point 4 of 9 and member 1 of 3 are both at t = ½: the same network, from the bank and from weights by torch name.
    middle = MemberSession(version.folder / "members/001.onnx")
    assert softmax(session[4].logits(images)) == pytest.approx(softmax(middle.logits(images)), abs=1e-5)
    network = networks.build("preresnet8", 10, (1, 8, 8), {"width": 0.25})
    network.load_state_dict(load_file(version.folder / "weights/001.safetensors"))
    with torch.no_grad():
        expected = network.eval()((torch.from_numpy(images) - splits.mean[0]) / splits.std[0]).numpy()
    assert softmax(session[4].logits(images)) == pytest.approx(softmax(expected), abs=1e-5)
    probs = softmax(session[3].logits(images), bank.temperature[3])
    assert bank.accuracy[3] == pytest.approx((probs.argmax(1) == labels).mean())
    assert not np.allclose(session[3].logits(images), session[8].logits(images), atol=1e-2)
    assert len({round(t, 6) for t in bank.coefficients[:, 0]}) == 9


def test_the_bends_are_trained_and_the_ends_are_not():
    version = curve.run(Config(name="c", bank=0, members=2, **{**SMALL, "epochs": 4}))
    first, bend, last = (load_file(version.folder / f"vertices/{i:03d}.safetensors") for i in range(3))
    halfway = (first["head.weight"] + last["head.weight"]) / 2
    assert not torch.allclose(bend["head.weight"], halfway, atol=1e-3)
    assert not torch.allclose(first["head.weight"], last["head.weight"], atol=1e-2)
    assert version.manifest.bank is None
    assert version.manifest.provenance.epochs_spent == 12


def test_a_member_that_is_not_there_is_told():
    independent.run(independent.Config(name="ends", **{**SMALL, "runs": 2, "epochs": 1}))
    with pytest.raises(CheckpointError, match="has no member 7"):
        curve.run(Config(endpoints=("ends/0", "ends/7"), **SMALL))


def rows_network(num_classes, input_shape):
    network = test_export.Rows()
    network.head = nn.Linear(24, num_classes)
    return network


def attention_network(num_classes, input_shape):
    network = test_export.Attention()
    network.head = nn.Linear(16, num_classes)
    return network


def odd_network(num_classes, input_shape):
    network = test_export.Odd()
    network.head = nn.Linear(64, num_classes)
    return network


class Merged(nn.Module):
    """Its eval mode uses a product of two weights, computed in train(False), so it is not linear in its parameters."""

    def __init__(self, classes):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(classes, 64) * 0.2), nn.Parameter(torch.randn(classes, 64) * 0.2)

    def train(self, mode=True):
        self.merged = None if mode else (self.a * self.b).detach().clone()
        return super().train(mode)

    def forward(self, images):
        weight = self.a * self.b if self.merged is None else self.merged
        return images.flatten(1) @ weight.T


def merged_network(num_classes, input_shape):
    return Merged(num_classes)


@pytest.mark.parametrize("factory", ["rows_network", "attention_network", "odd_network"])
def test_any_module_can_be_curved_and_its_ends_are_exact(factory, tmp_path):
    """LSTM, transformer, and a module with GroupNorm, PReLU, a tied weight and a buffer that is not a statistic."""
    make = globals()[factory]
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(make(10, (1, 8, 8)).state_dict(), tmp_path / f"{seed}.pt")
    options = {"network": f"tests.training.test_curve:{factory}", "batch_size": 64, "limit": 640, "epochs": 2}
    ends = (str(tmp_path / "0.pt"), str(tmp_path / "1.pt"))
    version = curve.run(Config(name="own", endpoints=ends, bank=5, members=3, **options))  # publishing checks parity
    Store().verify(version)
    for index, file in ((0, "0.pt"), (2, "1.pt")):
        given = torch.load(tmp_path / file, weights_only=True)
        for kept in (f"weights/{index:03d}", f"vertices/{index:03d}"):
            found = load_file(version.folder / f"{kept}.safetensors")
            assert all(torch.equal(tensor, given[name]) for name, tensor in found.items())
    bank = Bank.load(version.folder / "bank")
    images, _ = data.as_arrays(data.load(Config(**options).data_options()).validation)
    for point, member in ((0, 0), (2, 1), (4, 2)):
        expected = MemberSession(version.folder / f"members/{member:03d}.onnx").logits(images)
        found = MemberSession(bank.template, weights=bank.weights(point)).logits(images)
        assert softmax(found) == pytest.approx(softmax(expected), abs=1e-5)


def test_a_module_that_no_bank_can_hold_publishes_its_members_and_says_why(capsys):
    options = {"network": "tests.training.test_curve:merged_network", "batch_size": 64, "limit": 640, "epochs": 1}
    version = curve.run(Config(name="merged", bank=5, members=3, lr=0.01, **options))
    out = capsys.readouterr().out
    assert "no bank: the exported graph is not this network with other weights put in" in out
    assert "does not hold a, b" in out
    assert version.manifest.bank is None
    assert not (version.folder / "bank").exists()
    Store().verify(version)


def test_a_bank_costs_its_vertices_and_a_few_buffers():
    """preresnet8 of width 16: a bank of 256 points is at most as large as V + 2 weight sets."""
    version = curve.run(
        Config(name="full", bank=256, members=2, bn_images=64, **{**SMALL, "network_options": (), "epochs": 1})
    )
    network = networks.build("preresnet8", 10, (1, 8, 8), {})
    one = sum(p.numel() for p in network.parameters()) * 4
    size = sum(file.stat().st_size for file in (version.folder / "bank").iterdir())
    assert math.isclose(one, 78_000 * 4, rel_tol=0.05)
    assert size <= (3 + 2) * one
