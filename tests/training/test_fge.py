import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models_store.graphs.runtime import EnsembleSession
from models_store.store import Store
from models_store.uncertainty import softmax
from training import data as data_module
from training import fge, networks
from training.errors import CheckpointError, ConfigError, DivergenceError
from training.fge import Config
from training.optimisation.schedules import fge_rate, plain_rate
from training.runs import Run


def plan(steps=10, **options):
    config = Config(**options)
    with Run.open("plan", {}, {}, fresh=True) as run:
        return config, fge.plan(config, run, steps).legs


def test_the_budget_is_split_and_the_schedule_is_of_the_whole_budget():
    config, (pretraining, cycles) = plan(epochs=10)
    assert pretraining.iterations == 80
    assert [pretraining.rate(i) for i in (1, 50, 80)] == [plain_rate(i, 100, config.lr) for i in (1, 50, 80)]
    assert len(cycles.collect) == 6
    assert cycles.iterations == cycles.collect[-1] <= 20
    assert all(cycles.rate(i) == pytest.approx(config.alpha_2) for i in cycles.collect)


@pytest.mark.parametrize("steps", [3, 10, 97, 375])
@pytest.mark.parametrize("epochs", [5, 10, 40])
@pytest.mark.parametrize("members", [1, 2, 6])
def test_never_more_than_the_budget_and_as_many_members_as_asked_or_a_refusal(steps, epochs, members):
    available = (epochs - round(0.8 * epochs)) * steps
    if available < 2 * (members - 1) + 1:  # cycles of two iterations each, the last of which ends after its first half
        with pytest.raises(ConfigError, match=f"--members {members} do not fit"):
            plan(steps, epochs=epochs, members=members)
        return
    _, (first, second) = plan(steps, epochs=epochs, members=members)
    assert first.iterations + second.iterations <= epochs * steps
    assert len(second.collect) == members


def test_a_given_cycle_that_leaves_another_number_of_members_is_said_beforehand():
    config = Config(epochs=20, cycle=4.0)
    with Run.open("plan", {}, {}, fresh=True) as run:
        assert "collected after each start: 1," in fge.plan(config, run, 10).note
        assert fge.plan(Config(epochs=20, cycle=0.8, members=5), run, 10).note is None


def test_the_cycle_can_be_given_and_training_stops_at_the_last_collection():
    config, (_, cycles) = plan(epochs=20, cycle=1.0)
    assert cycles.collect == (5, 15, 25, 35)
    assert cycles.iterations == 35
    assert cycles.rate(7) == fge_rate(7, 10, config.alpha_1, config.alpha_2)


def test_several_starts_share_the_rest_of_the_budget():
    _, (pretraining, *cycles) = plan(epochs=20, starts=(12, 14, 16), members=2)
    assert [epoch for epoch, _ in pretraining.keep] == [12, 14, 16]
    assert [leg.start for leg in cycles] == [file for _, file in pretraining.keep]
    assert sum(leg.iterations for leg in cycles) <= 40


def test_with_given_weights_the_whole_budget_is_cycles():
    _, legs = plan(epochs=5, init=(Path("a.pt"), Path("b.pt")), members=3)
    assert len(legs) == 2
    assert sum(leg.iterations for leg in legs) <= 50
    assert all(len(leg.collect) == 3 for leg in legs)


def test_runs_are_whole_budgets_from_networks_of_their_own():
    _, legs = plan(epochs=10, runs=3)
    pretrainings, cycles = legs[::2], legs[1::2]
    assert [leg.start.stem for leg in pretrainings] == ["fresh-0", "fresh-1", "fresh-2"]
    assert [leg.start for leg in cycles] == [leg.keep[0][1] for leg in pretrainings]
    assert len({leg.start for leg in cycles}) == 3
    assert sum(leg.iterations for leg in legs) <= 300


def test_a_cycle_that_does_not_fit_is_told():
    with pytest.raises(ConfigError, match="shorten --cycle"):
        plan(epochs=10, cycle=5.0)


SMALL = {
    "network": "preresnet8",
    "network_options": ("width=0.25",),
    "epochs": 5,
    "members": 2,
    "batch_size": 64,
    "limit": 640,
}


def test_train_publish_and_find_it_finished(capsys):
    version = fge.run(Config(name="d", **SMALL))
    store = Store()
    store.verify(version)
    manifest = version.manifest
    assert (manifest.method, len(manifest.members), manifest.input.shape) == ("fge", 2, (1, 8, 8))
    assert [m.origin.cycle for m in manifest.members] == [1, 2]
    assert manifest.provenance.epochs_spent <= 5
    assert (manifest.schema_version, manifest.calibration.images) == (
        2,
        72,
    )  # the other half of 144 fits the temperature
    assert sum(manifest.calibration.cascade.groups) == 2
    # The scores in the manifest are those of the exported files.
    found = data_module.load(Config(**SMALL).data_options())
    images, labels = data_module.as_arrays(found.validation)
    session = EnsembleSession(version.folder, manifest)
    average = session.combine(session.member_probs(images)).mean_probs
    assert manifest.validation.accuracy == pytest.approx((average.argmax(1) == labels).mean())
    assert manifest.validation.nll == pytest.approx(-np.log(average[np.arange(len(labels)), labels]).mean(), abs=1e-6)
    # Weights by torch name give the members' answers.
    network = networks.build("preresnet8", 10, (1, 8, 8), {"width": 0.25})
    network.load_state_dict(load_file(version.folder / manifest.members[0].weights))
    with torch.no_grad():
        logits = network.eval()((torch.from_numpy(images) - found.mean[0]) / found.std[0]).numpy()
    assert softmax(logits, manifest.temperature) == pytest.approx(session.member_probs(images)[0], abs=1e-5)

    capsys.readouterr()
    assert fge.run(Config(name="d", **SMALL)).manifest == manifest
    assert "already finished" in capsys.readouterr().out
    assert store.versions("d") == [1]
    assert fge.run(Config(name="d", fresh=True, **SMALL)).manifest.version == 2


def test_given_weights_are_members_and_starts(tmp_path, capsys):
    torch.manual_seed(0)
    network = networks.build("mlp", 10, (1, 8, 8), {})
    torch.save({"state_dict": nn.DataParallel(network).state_dict()}, tmp_path / "mine.pt")
    version = fge.run(
        Config(name="m", network="mlp", epochs=2, members=2, init=(tmp_path / "mine.pt",), mean=(0.3,), std=(0.3,))
    )
    assert "warning: the validation images were set aside" in capsys.readouterr().out
    assert [m.origin.cycle for m in version.manifest.members] == [0, 1, 2]
    given = load_file(version.folder / "weights/000.safetensors")
    assert all(torch.equal(given[k], v) for k, v in network.state_dict().items())
    moved = load_file(version.folder / "weights/001.safetensors")
    assert not torch.equal(moved["1.weight"], given["1.weight"])


def test_given_weights_without_the_statistics_they_were_trained_with_bring_a_warning(tmp_path, capsys):
    torch.save(networks.build("mlp", 10, (1, 8, 8), {}).state_dict(), tmp_path / "mine.pt")
    options = {"network": "mlp", "epochs": 2, "members": 2, "limit": 640, "init": (tmp_path / "mine.pt",)}
    fge.run(Config(name="m", **options))
    assert "warning: the given network gets images normalised by mean" in capsys.readouterr().out
    fge.run(Config(name="m", mean=(0.3,), std=(0.3,), **options))
    assert "the given network gets images normalised" not in capsys.readouterr().out


def test_a_training_that_diverges_names_the_folder_with_the_weights_from_before(tmp_path):
    with pytest.raises(DivergenceError, match="Weights from before the failure are kept in") as raised:
        fge.run(Config(network="mlp", epochs=4, pretrain=0.5, members=2, alpha_1=1e30, limit=640))
    (folder,) = (tmp_path / "runs").glob("fge-*")
    assert str(folder) in str(raised.value)
    assert list(folder.rglob("*.safetensors"))


def test_a_missing_checkpoint_is_told_before_training(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        fge.run(Config(network="mlp", epochs=2, init=(tmp_path / "none.pt",)))


USERS_MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Rows(nn.Module):
    def __init__(self, classes, hidden):
        super().__init__()
        self.lstm = nn.LSTM(6, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)
    def forward(self, images):
        return self.head(self.lstm(images.squeeze(1))[0][:, -1])

def make_network(num_classes, input_shape, hidden=8):
    return Rows(num_classes, hidden)

def make_data():
    generator = torch.Generator().manual_seed(0)
    def split(n):
        images = torch.rand(n, 1, 6, 6, generator=generator)
        return TensorDataset(images, (images[:, 0, -1].mean(1) > 0.5).long())
    return split(256), split(64), split(64)
"""


def test_the_users_own_module_data_and_checkpoint(command, tmp_path):
    """An LSTM from outside the project, trained through the command line."""
    (tmp_path / "mine.py").write_text(USERS_MODULE)
    sys.path.insert(0, str(tmp_path))
    try:
        import mine  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(tmp_path))
    torch.save(nn.DataParallel(mine.Rows(2, 8)).state_dict(), tmp_path / "mine.pt")
    common = [
        "training.fge",
        "--network",
        "mine:make_network",
        "--dataset",
        "mine:make_data",
        "--members",
        "2",
        "--batch-size",
        "32",
    ]
    done = command(*common, "--name", "own", "--epochs", "4", "--network-options", "hidden=8")
    assert done.returncode == 0, done.stderr
    assert "measured on 256 training images" in done.stdout
    done = command(*common, "--name", "warm", "--epochs", "2", "--init", "mine.pt", "--activate-anyway")
    assert done.returncode == 0, done.stderr
    for name, members in (("own", 2), ("warm", 3)):
        version = Store().load(name)
        Store().verify(version)
        assert len(version.manifest.members) == members
    assert command("training.evaluate", "own").returncode == 0


def test_two_processes_train_one_run(command):
    arguments = [
        "--epochs",
        "4",
        "--members",
        "2",
        "--limit",
        "512",
        "--name",
        "pair",
        "--devices",
        "2",
        "--device",
        "cpu",
    ]
    done = command("training.fge", *arguments)
    assert done.returncode == 0, done.stderr
    version = Store().load("pair")
    Store().verify(version)
    assert "2 processes" in version.manifest.provenance.device
    assert done.stdout.count("pre-training epoch 1/") == 1
    assert "already finished" in command("training.fge", *arguments).stdout
