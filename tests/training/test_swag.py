import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models_store.store import Store
from tests.training import test_curve
from tests.training.conftest import SMALL
from training import independent, swag
from training.errors import ConfigError
from training.runs import Run
from training.swag import Config


def plan(steps=10, **options):
    config = Config(**options)
    with Run.open("plan", {}, {}, fresh=True) as run:
        return config, swag.plan(config, run, steps)


def test_the_rate_falls_to_its_constant_and_weights_are_collected_there():
    config, made = plan(epochs=20, start=0.5, lr=0.1, swag_lr=0.02, every=2.0)
    (leg,) = made.legs
    assert leg.collect == (120, 140, 160, 180, 200)
    assert leg.rate(1) == pytest.approx(0.1)
    assert all(leg.rate(i) == pytest.approx(0.02) for i in (91, 100, 101, 200))
    assert len(made.vertices) == config.samples


def test_around_given_weights_the_whole_budget_is_collected():
    _, made = plan(epochs=6, init=("a.pt", "b.pt"), samples=4)
    assert [leg.collect for leg in made.legs] == [(10, 20, 30, 40, 50, 60)] * 2
    assert made.legs[0].rate(1) == Config.swag_lr
    assert len(made.vertices) == 8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 4}, "1 collections fit"),
        ({"rank": 1}, "--rank"),
        ({"endpoints": ("a", "b"), "samples": 0}, "with --endpoints that mean is a curve"),
        ({"start": 1.0}, "--start"),
        ({"endpoints": ("a",)}, "two networks"),
        ({"endpoints": ("a", "b"), "init": ("c",)}, "cannot be combined with --init"),
        ({"init": ("c",), "runs": 2}, "--runs"),
    ],
)
def test_what_cannot_be_carried_out_is_told(options, told):
    with pytest.raises(ConfigError, match=told):
        plan(**options)


def test_networks_of_several_gaussians_are_published():
    version = swag.run(Config(name="s", epochs=8, runs=2, samples=3, **SMALL))
    Store().verify(version)
    assert [one.origin.cycle for one in version.manifest.members] == [1, 1, 1, 2, 2, 2]
    assert version.manifest.provenance.epochs_spent == 16
    drawn = [load_file(version.folder / member.weights) for member in version.manifest.members]
    name = next(k for k, t in drawn[0].items() if t.dim() == 4)

    def apart(a, b):
        return float((drawn[a][name] - drawn[b][name]).norm())

    assert 0 < max(apart(0, 1), apart(0, 2), apart(3, 4)) < apart(0, 3)


def test_without_samples_the_mean_of_the_collected_weights_is_published():
    version = swag.run(Config(name="s", epochs=8, samples=0, **SMALL))
    (member,) = version.manifest.members
    published = load_file(version.folder / member.weights)
    run = next(Path(os.environ["MODEPATH_RUNS"]).glob("swag-*"))
    passed = [load_file(file) for file in sorted(run.glob("vertices/*"))]
    assert len(passed) == 2
    for name, tensor in published.items():
        if "running" not in name and tensor.is_floating_point():
            assert torch.allclose(tensor, (passed[0][name] + passed[1][name]) / 2, atol=1e-6), name


def test_a_gaussian_over_the_bend_gives_points_of_curves_between_the_same_ends():
    """Each network is (1 − t)² a + 2t(1 − t) b + t² c, with a bend b near the weights that SGD visited."""
    ends = independent.run(independent.Config(name="ends", runs=2, epochs=2, **SMALL))
    options = {**SMALL, "epochs": 8, "endpoints": (f"{ends.name}/0", f"{ends.name}/1"), "samples": 4}
    config = Config(name="s", **options, lr=0.1, swag_lr=1e-7)
    version = swag.run(config)
    Store().verify(version)
    run = next(Path(os.environ["MODEPATH_RUNS"]).glob("swag-*"))
    first, last = (load_file(ends.folder / f"weights/{i:03d}.safetensors") for i in range(2))
    passed = load_file(sorted(run.glob("vertices/*"))[-1])
    name = next(k for k, t in passed.items() if t.dim() == 4)
    basis = np.stack([state[name].double().numpy().ravel() for state in (first, passed, last)], axis=1)
    seen = []
    for member in version.manifest.members:
        drawn = load_file(version.folder / member.weights)[name].double().numpy().ravel()
        found, *_ = np.linalg.lstsq(basis, drawn, rcond=None)
        assert np.linalg.norm(basis @ found - drawn) < 1e-3 * np.linalg.norm(drawn)
        t = np.sqrt(max(found[2], 0))
        assert found == pytest.approx([(1 - t) ** 2, 2 * t * (1 - t), t**2], abs=1e-2)
        seen.append(t)
    assert len({round(t, 3) for t in seen}) == 4


@pytest.mark.parametrize("factory", ["rows_network", "attention_network", "odd_network"])
def test_any_module_can_be_drawn_around(factory, tmp_path):
    """LSTM, transformer, and a module with GroupNorm, PReLU, a tied weight and a buffer that is not a statistic."""
    torch.manual_seed(0)
    torch.save(getattr(test_curve, factory)(10, (1, 8, 8)).state_dict(), tmp_path / "own.pt")
    options = {**SMALL, "network": f"tests.training.test_curve:{factory}", "network_options": ()}
    version = swag.run(Config(name="own", init=(tmp_path / "own.pt",), epochs=3, samples=2, **options))
    Store().verify(version)
    one, two = (load_file(version.folder / member.weights) for member in version.manifest.members)
    given = torch.load(tmp_path / "own.pt", weights_only=True)
    for name, tensor in given.items():
        if name == "scale":
            assert torch.equal(one[name], tensor)
        else:
            assert not torch.equal(one[name], two[name])
