import json

import numpy as np
import pytest
import torch
from torch import nn

from models_store.manifest import InputSpec
from training.errors import CheckpointError, RunError
from training.runs import PREFIXED, NetworkPrint, Progress, Run, load_state, load_weights, save_state

CONFIG = {"epochs": 3}


def test_the_same_config_is_the_same_run_and_another_is_another(tmp_path):
    with Run.open("fge", CONFIG, {}, fresh=False) as first:
        pass
    with Run.open("fge", CONFIG, {}, fresh=False) as again, Run.open("fge", {"epochs": 4}, {}, fresh=False) as other:
        assert again.identity == first.identity
        assert other.folder != first.folder
    assert json.loads((first.folder / "run.json").read_text())["config"] == CONFIG


def test_fresh_forgets():
    with Run.open("fge", CONFIG, {}, fresh=False) as first:
        first.save_checkpoint({"a": torch.ones(1)}, Progress(1, 2, 3.5))
    with Run.open("fge", CONFIG, {}, fresh=True) as again:
        assert again.identity != first.identity
        assert again.progress() == Progress()


def test_a_checkpoint_comes_back_with_its_progress():
    with Run.open("fge", CONFIG, {}, fresh=False) as run:
        assert run.progress() == Progress()
        run.save_checkpoint({"a": torch.arange(3.0)}, Progress(1, 2, 3.5))
        assert run.progress() == Progress(1, 2, 3.5)
        assert torch.equal(run.load_checkpoint()["a"], torch.arange(3.0))


def test_changed_data_is_not_mixed_in():
    with Run.open("fge", CONFIG, {"the data set": "1"}, fresh=False):
        pass
    with (
        pytest.raises(RunError, match="the data set changed"),
        Run.open("fge", CONFIG, {"the data set": "2"}, fresh=False),
    ):
        pass


def test_two_processes_do_not_share_a_run():
    with (
        Run.open("fge", CONFIG, {}, fresh=False),
        pytest.raises(RunError, match="Another process"),
        Run.open("fge", CONFIG, {}, fresh=False),
    ):
        pass


def test_tied_and_strided_tensors_are_saved(tmp_path):
    tensor = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save_state(tmp_path / "s.safetensors", {"a": tensor, "b": tensor})
    assert torch.equal(load_state(tmp_path / "s.safetensors")["b"], tensor)


def test_a_damaged_checkpoint_is_told(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="--fresh"):
        load_state(tmp_path / "s.safetensors")


def test_a_users_module_named_network_keeps_its_names(tmp_path):
    own = {"network.weight": torch.ones(2), "head.weight": torch.zeros(3)}
    save_state(tmp_path / "vertex.safetensors", own)
    assert load_weights(tmp_path / "vertex.safetensors").keys() == own.keys()
    start = {f"network.{name}": tensor for name, tensor in own.items()} | {"momentum.head.weight": torch.ones(3)}
    save_state(tmp_path / "start.safetensors", start, PREFIXED)
    assert load_weights(tmp_path / "start.safetensors").keys() == own.keys()


def network(hidden=4, seed=0, scale=1.0):
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 3))

        def forward(self, images):
            return scale * self.body(images)

    return NetworkPrint.of(Net(), InputSpec(shape=(1, 4, 4)))


@pytest.mark.parametrize("other", [{"hidden": 16}, {"seed": 1}, {"scale": 2.0}])
def test_the_same_config_with_an_edited_network_is_another_run(other):
    with Run.open("fge", CONFIG, {}, fresh=False, network=network()) as first:
        first.save_checkpoint({"a": torch.ones(1)}, Progress(1, 2, 3.5))
    with Run.open("fge", CONFIG, {}, fresh=False, network=network(**other)) as edited:
        assert edited.folder != first.folder
        assert edited.identity != first.identity
        assert edited.progress() == Progress()
    with Run.open("fge", CONFIG, {}, fresh=False, network=network()) as again:
        assert again.identity == first.identity
    with Run.open("fge", CONFIG, {}, fresh=False, network=network(**other)) as once_more:
        assert once_more.identity == edited.identity


def test_last_bits_of_another_processor_are_not_another_network():
    now = network()
    with Run.open("fge", CONFIG, {}, fresh=False, network=now) as first:
        pass
    elsewhere = NetworkPrint(now.initial, (np.array(now.logits) * (1 + 1e-6)).tolist())
    with Run.open("fge", CONFIG, {}, fresh=False, network=elsewhere) as again:
        assert again.identity == first.identity


@pytest.mark.parametrize(("hidden", "found"), [(4, True), (16, False)])
def test_a_run_from_before_networks_were_recorded_is_known_by_the_weights_it_began_from(hidden, found):
    with Run.open("fge", CONFIG, {}, fresh=False) as old:
        state = {f"network.{name}": tensor for name, tensor in network().initial.items()}
        save_state(old.start_file("fresh-0"), state, PREFIXED)
    assert "network" not in json.loads((old.folder / "run.json").read_text())
    with Run.open("fge", CONFIG, {}, fresh=False, network=network(hidden)) as now:
        assert (now.identity == old.identity) is found


def test_taking_a_print_draws_nothing_and_leaves_the_mode():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)).train()
    before = torch.get_rng_state()
    NetworkPrint.of(module, InputSpec(shape=(1, 4, 4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert module.training
