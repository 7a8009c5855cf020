import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models_store.store import Store
from tests.models_store.test_file_kind import HTML, LFS, zipped
from tests.onnx_members import linear, publish
from training.errors import CheckpointError
from training.runs import checkpoint
from training.runs.checkpoint import load_into


def make():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


SOURCE = make()


@pytest.mark.parametrize(
    "content",
    [
        SOURCE.state_dict(),
        {"state_dict": SOURCE.state_dict(), "epoch": 3},
        {"model_state": SOURCE.state_dict()},
        nn.DataParallel(SOURCE).state_dict(),
        {f"_orig_mod.module.{k}": v for k, v in SOURCE.state_dict().items()},
        {k: v for k, v in SOURCE.state_dict().items() if "num_batches" not in k},
    ],
    ids=["plain", "wrapped", "reference code", "DataParallel", "compiled", "without counters"],
)
def test_the_ways_people_save_weights_are_read(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")
    network = make()
    load_into(network, tmp_path / "c.pt")
    assert all(torch.equal(v, SOURCE.state_dict()[k]) for k, v in network.state_dict().items())


def test_safetensors_are_read(tmp_path):
    save_file(SOURCE.state_dict(), tmp_path / "c.safetensors")
    network = make()
    load_into(network, tmp_path / "c.safetensors")
    assert torch.equal(network[0].weight, SOURCE[0].weight)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", b"PK\x03\x04 broken", b"text"])
def test_what_is_no_checkpoint_is_told_and_never_run(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_into(make(), tmp_path / "c.pt")


@pytest.mark.parametrize("name", ["c.bin", "c.pt", "C.SAFETENSORS"])
def test_safetensors_are_known_by_what_they_are_whatever_their_name(tmp_path, name):
    save_file(SOURCE.state_dict(), tmp_path / name)
    network = make()
    load_into(network, tmp_path / name)
    assert torch.equal(network[0].weight, SOURCE[0].weight)


def test_a_pt_file_named_safetensors_is_read(tmp_path):
    torch.save(SOURCE.state_dict(), tmp_path / "c.safetensors")
    network = make()
    load_into(network, tmp_path / "c.safetensors")
    assert torch.equal(network[0].weight, SOURCE[0].weight)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (LFS, "git-lfs pointer.*git lfs pull"),
        (HTML, "HTML page"),
        (zipped("net/data.pkl", "net/constants.pkl", "net/code/net.py"), "TorchScript archive"),
        (zipped("net/data.pkl"), "damaged"),
        (linear(0).SerializeToString(), "ONNX model.*models_store import"),
    ],
)
def test_files_that_are_no_checkpoint_are_named_for_what_they_are(tmp_path, content, told):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        load_into(make(), tmp_path / "c.pt")


class Versioned(nn.Linear):
    """Refuses weights without a version, as torchvision's mnasnet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):  # pyright: ignore[reportIncompatibleMethodOverride]
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_file_that_was_cut_short_is_named_as_that(tmp_path):
    file = tmp_path / "cut.pt"
    torch.save({"weight": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="its download was cut short"):
        load_into(nn.Linear(3, 2), file)


def test_a_module_that_asks_for_its_version_gets_it(tmp_path):
    source = Versioned(3, 2)
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    network = Versioned(3, 2)
    load_into(network, tmp_path / "c.safetensors")
    assert torch.equal(network.weight, source.weight)


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(SOURCE, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="pickled module"):
        load_into(make(), tmp_path / "c.pt")


def test_another_architecture_is_told_with_names(tmp_path):
    torch.save(nn.Sequential(nn.Linear(3, 3)).state_dict(), tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"another network.*lacks.*0\.weight"):
        load_into(make(), tmp_path / "c.pt")


def test_nan_weights_and_missing_files_and_no_tensors_are_told(tmp_path):
    broken = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in SOURCE.state_dict().items()}
    torch.save(broken, tmp_path / "nan.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for file, told in (("nan.pt", "NaN"), ("none.pt", "no state_dict"), ("missing.pt", "does not exist")):
        with pytest.raises(CheckpointError, match=told):
            load_into(make(), tmp_path / file)


def test_an_ensemble_as_a_whole_is_no_network_but_its_members_are(tmp_path):
    store = Store(tmp_path / "store")
    publish(store, "pets", seeds=(0, 1))
    for reference in ("pets", "pets@1"):
        with pytest.raises(CheckpointError, match=f"{reference}/0"):
            checkpoint.find(reference, store)
        assert checkpoint.members(reference, store) == ["pets@1/0", "pets@1/1"]
    assert checkpoint.members("own.pt", store) == ["own.pt"]
