import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn
from torch.nn import functional

from models_store.bank import Bank
from models_store.graphs.runtime import EnsembleSession, MemberSession
from models_store.store import Store
from tests.training import test_curve
from tests.training.conftest import SMALL, make_data
from training import espro, independent, networks
from training.errors import ConfigError, DivergenceError
from training.espro import Config, complexes, describe, in_turn, perturbed, star
from training.geometry import volume
from training.geometry.vertices import combine, coordinates
from training.optimisation import hardware
from training.optimisation.seeds import Stream, derive
from training.optimisation.steps import BetweenVertices, Step, Training, pull_of

GROW = {**SMALL, "vertices": 2, "vertex_epochs": 2, "samples": 3, "bank": 5}


def vertices_of(version):
    return [load_file(version.folder / file) for file in version.manifest.geometry.vertices]


def names_of(version):
    network = version.manifest.network
    module = networks.build(
        network.factory, len(version.manifest.classes), version.manifest.input.shape, network.kwargs
    )
    return [name for name, _ in module.named_parameters()]


def test_every_mode_grows_a_simplex_of_its_own():
    assert complexes(Config(vertices=2), 1) == [[[0, 1, 2]]]
    assert complexes(Config(vertices=2), 3) == [[[0, 3, 4]], [[1, 5, 6]], [[2, 7, 8]]]


def test_connecting_vertices_are_shared():
    assert complexes(Config(connect=("0,3,4", "1,3,4", "2,3,4")), 3) == [[[0, 3, 4], [1, 3, 4], [2, 3, 4]]]


@pytest.mark.parametrize(
    ("connect", "modes", "told"),
    [
        (("0,3", "1,3", "2,3"), 2, None),
        (("0,2", "1,3"), 2, "is not connected: no simplexes join vertex 1"),
        (("0,2",), 2, "does not use vertex 1"),
        (("0,1,3",), 2, "does not use vertex 2"),
        (("0,1,2", "0,1"), 2, "has modes only"),
        (("0,1,2,1000000000000",), 2, "does not use vertex 3"),
    ],
)
def test_an_incidence_that_cannot_be_trained_is_told(connect, modes, told):
    if told is None:
        assert complexes(Config(connect=connect), modes)
        return
    with pytest.raises(ConfigError, match=told):
        complexes(Config(connect=connect), modes)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"connect": ("0;2",)}, "lists of vertices"),
        ({"connect": ("0,0",)}, "two different vertices"),
        ({"connect": ("2",)}, "two different vertices"),
        ({"connect": ("-1,2",)}, "counted from 0"),
        ({"perturbation": 0}, "simplex is flat"),
        ({"volume_weight": -1}, "--volume-weight"),
        ({"vertices": 0}, "--vertices"),
        ({"vertices": 2, "connect": ("0,1",)}, "--connect lists the vertices"),
        ({"samples": 0}, "--samples"),
        ({"base": ("a.pt",), "runs": 2}, "--runs"),
    ],
)
def test_what_cannot_be_carried_out_is_told(options, told):
    with pytest.raises(ConfigError, match=told):
        Config(**options)


def test_a_new_vertex_moves_the_simplexes_that_it_is_in_as_far_as_they_are_grown():
    joined = [[0, 3, 4, 5], [1, 3, 4, 5], [2, 4, 5]]
    assert star(joined, 3, {0, 1, 2}) == [[0, 3], [1, 3]]
    assert star(joined, 4, {0, 1, 2, 3}) == [[0, 3, 4], [1, 3, 4], [2, 4]]
    assert star(joined, 5, {0, 1, 2, 3, 4}) == [[0, 3, 4, 5], [1, 3, 4, 5], [2, 4, 5]]
    assert star([[0, 2, 3], [0, 2]], 2, {0}) == [[0, 2]]


def test_vertices_are_trained_in_an_order_in_which_each_has_something_to_hold_on_to():
    assert in_turn([[0, 3, 4], [1, 3, 4], [2, 4]], 3) == [3, 4]
    assert in_turn([[0, 3], [1, 3], [2, 3]], 2) == [3, 2]
    assert in_turn([[0, 4], [2, 3], [3, 4], [1, 2]], 2) == [2, 3, 4]


def test_the_perturbation_has_the_stated_length_in_every_tensor_and_is_seeded():
    state = {"a": torch.rand(30, 4), "b": torch.zeros(4), "mean": torch.ones(4)}
    one, two = (perturbed(state, ["a", "b"], 0.05, torch.Generator().manual_seed(3)) for _ in range(2))
    assert (one["a"] - state["a"]).norm().item() == pytest.approx(0.05 * state["a"].norm().item(), rel=1e-5)
    assert torch.equal(one["a"], two["a"])
    assert torch.equal(one["b"], state["b"])
    assert one["mean"] is state["mean"]


def test_a_flat_simplex_is_told_and_a_full_one_has_its_volume():
    points = np.array([[0.0, 0], [3, 0], [0, 4], [6, 0]])
    lines = describe(points, [[0, 1, 2], [0, 1, 3]]).splitlines()
    assert f"log-volume {np.log(6):.3f}, edges 3 … 5" in lines[0]
    assert "log-volume -inf" in lines[1]
    assert "a vertex is a combination of the others" in lines[1]


def test_training_and_publishing_draw_each_simplex_in_proportion_to_its_volume():
    """Three segments of lengths 1, 2 and 5 that meet in the connecting vertex 3."""
    places = np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 5], [0, 0, 0]])
    joined, lengths = [[0, 3], [1, 3], [2, 3]], np.array([1, 2, 5])
    config = Config(connect=("0,3", "1,3", "2,3"), samples=1000, points_per_step=3000)
    files = {vertex: Path() for vertex in range(3)}
    of_a_step = espro.within(config, files, joined, 3).draw(np.random.default_rng(0), places)
    of_the_members = espro._points(config, [joined], 4).members(places)
    for drawn in (of_a_step, of_the_members):
        assert drawn.shape == (3000, 4)
        assert (drawn[:, 3] > 0).all()
        counts = (drawn[:, :3] > 0).sum(axis=0)
        assert counts.sum() == 3000
        assert stats.chisquare(counts, 3000 * lengths / 8).pvalue > 1e-4


def test_it_is_published_with_its_base_its_samples_and_a_bank(capsys):
    version = espro.run(Config(name="e", runs=2, epochs=3, **{**GROW, "points_per_step": 2}))
    Store().verify(version)
    manifest = version.manifest
    assert manifest.geometry.shape == "simplex"
    assert manifest.geometry.components == [[0, 2, 3], [1, 4, 5]]
    assert len(manifest.members) == 6
    for index, member in enumerate(manifest.members):
        drawn = np.array(member.origin.coefficients)
        own = manifest.geometry.components[index // 3]
        assert (drawn[own] > 0).all()
        assert drawn.sum() == pytest.approx(1)
        assert drawn[own].sum() == pytest.approx(1)
    assert manifest.bank.points == 5
    # Each run has 3 epochs of plain training, and two vertices with 2 epochs and 2 networks per step.
    assert manifest.provenance.epochs_spent == pytest.approx(2 * (3 + 2 * 2 * 2))
    said = capsys.readouterr().out
    # Batch norm of 6 members and 5 bank points, each on all 576 training images.
    assert manifest.provenance.epochs_forward == 11
    assert "cost 22 plain epochs, and 11 epochs of forward passes for batch norm" in said
    assert said.count("log-volume") == 2
    places = coordinates(vertices_of(version), names_of(version))
    assert np.isfinite(volume.log_volumes(places, manifest.geometry.components)).all()


def test_a_larger_volume_weight_makes_a_larger_simplex():
    base = independent.run(independent.Config(name="base", runs=1, epochs=3, **SMALL))
    sizes = []
    for weight in (0.0, 0.1):
        grown = espro.run(Config(name="e", base=(base.name,), volume_weight=weight, **GROW))
        found = vertices_of(grown)
        assert all(torch.equal(found[0][k], v) for k, v in load_file(base.folder / "weights/000.safetensors").items())
        sizes.append(volume.log_volume(coordinates(found, names_of(grown))))
    assert sizes[1] > sizes[0] + 1


def no_loss(logits, labels):
    return 0 * logits.sum()


def test_a_vertex_that_no_loss_holds_back_rises_as_far_as_the_help_says():
    base = independent.run(independent.Config(name="base", epochs=1, **{**SMALL, "runs": 1}))
    free = {"loss": "tests.training.test_espro:no_loss", "weight_decay": 0.0}
    options = {**GROW, **free, "vertices": 3, "vertex_epochs": 20, "samples": 1, "bank": 0}
    grown = espro.run(Config(name="e", base=(base.name,), vertex_lr=0.03, volume_weight=0.2, **options))
    places = coordinates(vertices_of(grown), names_of(grown))
    iterations = 20 * 9  # 576 images are 9 steps
    for k in (1, 2, 3):
        weight = 0.2 * 6 / ((k + 1) * (k + 2))
        height = volume.heights(places[: k + 1])[-1]
        # Momentum carries the first, strongest step further than the closed form predicts.
        assert height == pytest.approx(np.sqrt(weight * 0.03 * iterations / 0.1), rel=0.2)


def test_modes_of_a_published_ensemble_are_joined_through_shared_vertices():
    independent.run(independent.Config(name="modes", runs=3, epochs=2, **SMALL))
    connect = ("0,3,4", "1,3,4", "2,4")
    version = espro.run(
        Config(name="k", base=("modes",), connect=connect, **{**GROW, "points_per_step": 2, "vertices": None})
    )
    Store().verify(version)
    geometry = version.manifest.geometry
    assert geometry.shape == "complex"
    assert geometry.components == [[0, 3, 4], [1, 3, 4], [2, 4]]
    assert len(version.manifest.members) == 9
    images = np.random.default_rng(0).random((2, 1, 8, 8), np.float32)
    probs = EnsembleSession(version.folder, version.manifest).member_probs(images)
    assert np.isfinite(probs).all()


def test_checkpoints_and_single_members_are_bases_too(tmp_path):
    version = independent.run(independent.Config(name="two", runs=2, epochs=2, **SMALL))
    file = version.folder / "weights/001.safetensors"
    assert Config(base=("two/0", "two@1/1", str(file))).given() == ("two/0", "two@1/1", str(file))
    assert Config(base=("two", "two@1")).given() == ("two@1/0", "two@1/1", "two@1/0", "two@1/1")
    assert Config(base=("missing.pt",)).given() == ("missing.pt",)
    with pytest.raises(ConfigError, match="two@1/0 twice"):
        espro.run(Config(name="k", base=("two", "two/0"), connect=("0,1,2", "2,3"), **{**GROW, "vertices": None}))


def test_the_same_command_finds_its_run_whatever_was_published_since_under_the_names_it_begins_from(capsys):
    independent.run(independent.Config(name="pets", epochs=1, runs=1, **SMALL))
    config = Config(name="pets", base=("pets",), **GROW)
    grown = espro.run(config)
    assert grown.name == "pets@2"
    assert grown.manifest.provenance.config["base"] == ["pets@1/0"]
    assert espro.run(config).name == "pets@2"
    assert "already finished: this run published pets@2" in capsys.readouterr().out
    again = espro.run(dataclasses.replace(config, fresh=True))
    assert again.manifest.provenance.config["base"] == ["pets@2/0", "pets@2/1", "pets@2/2"]


def test_options_of_modes_are_said_to_be_unused_where_the_modes_are_given(capsys):
    independent.run(independent.Config(name="base", epochs=1, runs=1, **SMALL))
    espro.run(Config(name="e", base=("base",), **GROW))
    assert "--vertex-epochs" not in capsys.readouterr().out
    espro.run(Config(name="f", base=("base",), epochs=7, **GROW))
    assert "note: --epochs and --lr apply to modes" in capsys.readouterr().out


@pytest.mark.parametrize(("factory", "rate"), [("rows_network", 0.3), ("attention_network", 0.1), ("odd_network", 0.1)])
def test_any_module_can_be_grown_around_and_its_base_is_exact(factory, rate, tmp_path):
    """LSTM, transformer, and a module with GroupNorm, PReLU, a tied weight and a buffer that is not a statistic."""
    torch.manual_seed(0)
    torch.save(getattr(test_curve, factory)(10, (1, 8, 8)).state_dict(), tmp_path / "own.pt")
    given = torch.load(tmp_path / "own.pt", weights_only=True)
    module = {"network": f"tests.training.test_curve:{factory}", "network_options": ()}
    grow = {**GROW, **module, "vertex_epochs": 20, "vertex_lr": rate}
    # Without the volume term, so that only the loss moves a vertex from its start. Publishing checks parity.
    version = espro.run(Config(name="own", base=(str(tmp_path / "own.pt"),), volume_weight=0.0, **grow))
    Store().verify(version)
    base, *others = vertices_of(version)
    assert all(torch.equal(tensor, given[name]) for name, tensor in base.items())
    for vertex, other in enumerate(others, 1):
        generator = torch.Generator().manual_seed(derive(0, Stream.SIMPLEXES, 0, vertex))
        mean = combine([base, *others[: vertex - 1]], np.full(vertex, 1 / vertex))
        began = perturbed(mean, names_of(version), 0.01, generator)
        for name in names_of(version):
            assert not torch.equal(other[name], began[name]), (vertex, name)
    assert version.manifest.validation.nll < 0.95 * np.log(10)  # the given network is untrained
    bank = Bank.load(version.folder / "bank")
    assert len(bank) == 5
    images = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    for point in range(2):
        logits = MemberSession(bank.template, weights=bank.weights(point)).logits(images)
        assert np.isfinite(logits).all()


def test_a_vertex_that_diverges_is_told(tmp_path):
    base = independent.run(independent.Config(name="base", epochs=1, **{**SMALL, "runs": 1}))
    with pytest.raises(DivergenceError, match="--vertex-lr"):
        espro.run(Config(name="e", base=(base.name,), vertex_lr=1e9, **{**GROW, "vertices": 2}))


def test_a_step_in_a_flat_simplex_goes_on_without_the_volume():
    config = Config(precision="32", device="cpu", points_per_step=3)
    fabric, network = hardware.launch(config), nn.Linear(4, 3)
    fixed = [{name: torch.randn_like(tensor) for name, tensor in network.state_dict().items()} for _ in range(2)]
    span = espro.within(config, [Path()] * 2, [[0, 1, 2]], 2)
    middle = combine(fixed, [0.5, 0.5])
    span = dataclasses.replace(span, begin=lambda others, parameters: [middle])
    steps = BetweenVertices(Training(config, fabric, network, make_data()), span, fixed, set())
    images, labels = torch.randn(8, 4), torch.arange(8) % 3
    before = {name: tensor.clone() for name, tensor in steps.collected()[0].items()}
    steps.take(
        pull_of(lambda: functional.cross_entropy(network(images), labels)), Step(1, 0.1, np.random.default_rng(0), 64)
    )
    for name, tensor in steps.collected()[0].items():
        assert torch.isfinite(tensor).all()
        assert not torch.equal(tensor, before[name])


WATCHED = """
import hashlib, os, pathlib
from training import command, espro
from training.optimisation import steps

def show(self, shown=steps.BetweenVertices.show):
    free = b"".join(t.detach().numpy().tobytes() for i in self._vertices.free for t in self._vertices.named_trained(i).values())
    pathlib.Path("rank" + os.environ.get("LOCAL_RANK", "0")).write_text(hashlib.sha256(free).hexdigest())
    shown(self)

steps.BetweenVertices.show = show
command.main(espro.Config, espro.run, espro.__doc__)
"""


def test_two_processes_grow_one_simplex(command, tmp_path):
    (tmp_path / "watched.py").write_text(WATCHED)
    grow = ["--vertices", "2", "--vertex-epochs", "2", "--points-per-step", "2", "--samples", "2", "--bank", "0"]
    arguments = ["--epochs", "2", "--limit", "256", *grow, "--name", "pair", "--devices", "2", "--device", "cpu"]
    done = command("watched", *arguments)
    assert done.returncode == 0, done.stderr
    version = Store().load("pair")
    Store().verify(version)
    assert "2 processes" in version.manifest.provenance.device
    assert done.stdout.count("vertex 1/2 epoch 1/2") == 1
    # Processes that sampled different points would get different gradients, and their vertices would diverge.
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
