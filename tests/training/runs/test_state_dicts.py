"""What people's tools save, and what is found in it."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from training.errors import CheckpointError
from training.runs import checkpoint
from training.runs.checkpoint import load_into


class Net(nn.Module):
    """A body and a head, as most classifiers have."""

    def __init__(self, classes=3, *, tied=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        if tied:
            self.body[2].weight = nn.Parameter(torch.randn(8, 8))
            self.again = nn.Linear(8, 8)
            self.again.weight = self.body[2].weight
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x))


torch.manual_seed(0)
SOURCE, OTHER = Net(), Net()
STATE, AVERAGED = SOURCE.state_dict(), OTHER.state_dict()


def below(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(tmp_path, content, part=None, *, source=SOURCE, **options):
    file = tmp_path / "c.pt"
    if content is not None:
        torch.save(content, file)
    network = Net(tied=hasattr(source, "again"))
    notes = load_into(network, file, part, **options)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    return " ".join(notes)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"state_dict": below("model."), "hyper_parameters": {"lr": 0.1}, "epoch": 3}, "prefix 'model.'"),
        ({"state_dict": below("net."), "hparams_name": "kwargs"}, "prefix 'net.'"),
        ({"model": STATE, "args": argparse.Namespace(lr=0.1, blocks=[1, 2])}, ""),
        ({"model": STATE, "best_acc1": np.float64(0.9), "epoch": np.int64(3)}, ""),
        ({"state_dict": below("module."), "optimizer": {"state": {0: {"exp_avg": torch.zeros(8, 4)}}, "param_groups": []}}, "prefix 'module.'"),
        ({"params": STATE}, ""),
        ({"weights": STATE}, ""),
        ({"model": {"state_dict": STATE}}, ""),
        (below("model._orig_mod."), "prefix 'model.'"),
        ({name.replace("body.", "body._orig_mod."): tensor for name, tensor in STATE.items()}, ""),
        ({**STATE, "total_ops": torch.zeros(1), "body.total_params": torch.zeros(1), "loss.weight": torch.ones(3)}, "loss.weight is not of this network"),
        ({**below("module."), "n_averaged": torch.tensor(7)}, "prefix 'module.'"),
        ({"state_dict": below("student."), "epoch": 1}, "prefix 'student.'"),
    ],
    ids=["lightning", "lightning net", "namespace", "numpy scalars", "DDP and optimizer", "params", "weights", "wrapped twice",
         "compiled", "compiled inside", "leftovers", "AveragedModel", "student"],
)  # fmt: skip
def test_the_weights_are_found_wherever_a_tool_puts_them(tmp_path, content, told):
    assert told in loaded(tmp_path, content)


@pytest.mark.parametrize("key", ["model_ema", "ema", "swa_state_dict", "state_dict_ema"])
def test_of_raw_and_averaged_weights_the_raw_ones_are_taken_and_the_others_offered(tmp_path, key):
    content = {"state_dict": STATE, key: AVERAGED}
    assert f"averaged ones are {tmp_path / 'c.pt'}#{key}" in loaded(tmp_path, content)
    loaded(tmp_path, None, key, source=OTHER)
    given = checkpoint.find(f"{tmp_path / 'c.pt'}#{key}", None)
    assert (given.file, given.part) == (tmp_path / "c.pt", key)


def test_a_student_and_its_teacher_are_told_apart(tmp_path):
    content = {"state_dict": {**below("student."), **below("teacher.", AVERAGED)}}
    assert "#teacher" in loaded(tmp_path, content)
    loaded(tmp_path, None, "teacher", source=OTHER)


def test_two_networks_that_both_fit_are_asked_about(tmp_path):
    with pytest.raises(CheckpointError, match=r"say which one: .*#first, .*#second"):
        loaded(tmp_path, {"first": STATE, "second": AVERAGED})
    loaded(tmp_path, None, "second", source=OTHER)
    with pytest.raises(CheckpointError, match="no weights of this network under 'third'"):
        loaded(tmp_path, None, "third")


def test_a_larger_network_that_contains_the_names_is_another_one(tmp_path):
    larger = {**STATE, "body.4.weight": torch.zeros(8, 8)}
    with pytest.raises(CheckpointError, match=r"has besides body\.4\.weight"):
        loaded(tmp_path, larger)


def test_a_head_of_another_size_is_begun_anew_where_that_is_asked_for(tmp_path):
    pretrained = Net(1000)
    torch.save({"state_dict": below("model.", pretrained.state_dict())}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="--reset-head takes the others"):
        load_into(Net(), tmp_path / "c.pt")
    network = Net()
    own = network.head.weight.clone()
    notes = " ".join(load_into(network, tmp_path / "c.pt", reset_head=True))
    assert "begins with new weights" in notes
    assert torch.equal(network.body[0].weight, pretrained.body[0].weight)
    assert torch.equal(network.head.weight, own)


def test_tied_weights_are_stored_once_and_loaded_for_all(tmp_path):
    tied = Net(tied=True)
    save_model(tied, str(tmp_path / "c.pt"))
    loaded(tmp_path, None, source=tied)


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
    names = list(STATE)
    files = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, own in files.items():
        save_file({name: STATE[name] for name in own}, tmp_path / file)
    import json

    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for given in (tmp_path, tmp_path / "model.safetensors.index.json"):
        network = Net()
        load_into(network, given)
        assert torch.equal(network.head.weight, SOURCE.head.weight)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_into(Net(), tmp_path)


def test_a_checkpoint_of_lightning_is_read(tmp_path):
    # Not in the dev extra: its torchmetrics would be imported at the start of every command.
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"lr": 0.1})
            self.net = Net()
            self.net.load_state_dict(STATE)
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))

        def training_step(self, batch):
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.0, weight_decay=0.0)

    rows = torch.utils.data.TensorDataset(torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64))
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
        enable_checkpointing=False,
    )  # fmt: skip
    with pytest.warns():
        trainer.fit(Module(), torch.utils.data.DataLoader(rows, 2))
    trainer.save_checkpoint(tmp_path / "c.pt")
    assert "prefix 'net.'" in loaded(tmp_path, None)


def test_a_checkpoint_of_timm_is_read(tmp_path):
    timm = pytest.importorskip("timm", reason="not installed")
    source = timm.create_model("resnet10t", num_classes=5)
    torch.save(
        {"state_dict": source.state_dict(), "state_dict_ema": source.state_dict(), "arch": "resnet10t"},
        tmp_path / "c.pt",
    )
    network = timm.create_model("resnet10t", num_classes=5)
    load_into(network, tmp_path / "c.pt")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), source.eval()(images))


def test_a_folder_of_transformers_is_read(tmp_path):
    transformers = pytest.importorskip("transformers", reason="not installed")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_labels=3
    )
    source = transformers.BertForSequenceClassification(config)
    source.save_pretrained(tmp_path / "model")
    network = transformers.BertForSequenceClassification(config)
    load_into(network, tmp_path / "model")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(network.eval()(ids).logits, source.eval()(ids).logits)


def layers(count, width=10):
    sizes = [width] * count
    return nn.Sequential(
        nn.Flatten(), *(one for size in sizes for one in (nn.Linear(width, size), nn.ReLU())), nn.Linear(width, 10)
    )


@pytest.mark.parametrize("reset_head", [False, True])
def test_a_deeper_network_of_numbered_layers_is_another_one(tmp_path, reset_head):
    torch.save(layers(3).state_dict(), tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"has besides 5\.weight") as refused:
        load_into(layers(1), tmp_path / "c.pt", reset_head=reset_head)
    assert "--reset-head takes" not in str(refused.value)


def test_what_an_optimizer_keeps_is_not_taken_for_weights(tmp_path):
    other = {name: tensor[:1] for name, tensor in STATE.items()}
    torch.save({"model": other, "optimizer": {"exp_avg": STATE}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="another network"):
        load_into(Net(), tmp_path / "c.pt")
    save_file({**below("network."), **below("momentum.", AVERAGED)}, tmp_path / "c.pt")
    assert "prefix 'network.'" in loaded(tmp_path, None)


def test_integers_are_no_weights(tmp_path):
    torch.save({name: tensor.to(torch.int8) for name, tensor in STATE.items()}, tmp_path / "c.pt")
    with pytest.raises(
        CheckpointError, match=r"another network: it has body\.0\.weight of torch\.int8 instead of torch\.float32"
    ):
        load_into(Net(), tmp_path / "c.pt")


def test_a_network_in_a_wrapper_takes_the_weights_of_the_network(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Net()

    torch.save({"state_dict": below("model.")}, tmp_path / "c.pt")
    wrapped = Wrapped()
    load_into(wrapped, tmp_path / "c.pt")
    assert torch.equal(wrapped.network.head.weight, SOURCE.head.weight)
