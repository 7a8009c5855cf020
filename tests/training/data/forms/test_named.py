import numpy as np
import pytest
import torch
from torch import nn

import modepath
from models_store.graphs.runtime import EnsembleSession
from models_store.manifest import TableField
from training import data, fge, networks
from training.data import DataOptions
from training.errors import DataError, NetworkError

RNG = np.random.default_rng(0)
LABELS = np.arange(240) % 3
PHOTOS = (RNG.random((240, 1, 6, 6)) * 120 + 60 * LABELS[:, None, None, None]).astype(np.uint8)
AGES = RNG.normal(50, 10, 240)


def parts(**more):
    cuts = {"train": slice(0, 200), "test": slice(200, 240)}
    return {
        name: ({"photo": PHOTOS[rows], "age": AGES[rows], "wave": RNG.normal(size=(240, 2, 5))[rows]}, LABELS[rows])
        for name, rows in cuts.items()
    } | more


class Two(nn.Module):
    """A network with three inputs."""

    def __init__(self, classes, shapes):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(shapes["photo"][0], 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))
        self.look(torch.zeros(2, *shapes["photo"]))
        self.rest = nn.Linear(8 + shapes["age"][0] + shapes["wave"][0] * shapes["wave"][1], classes)

    def forward(self, photo, age, wave):
        return self.rest(torch.cat([self.look(photo), age, wave.flatten(1)], dim=1))


def two(num_classes, input_shape):
    return Two(num_classes, input_shape)


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr("training.data.sources.find.import_string", lambda _: parts)
    return data.load(DataOptions("mine:parts"))


def test_named_inputs_become_fields_and_bytes_become_pixels(loaded):
    assert loaded.input.fields == [
        TableField(name="photo", shape=(1, 6, 6), low=0, high=1), TableField(name="age", shape=(1,)), TableField(name="wave", shape=(2, 5)),
    ]  # fmt: skip
    assert loaded.shape == (47,)
    assert loaded.test.images[3, :36].numpy() == pytest.approx(PHOTOS[203].ravel() / 255)
    assert loaded.test.images[3, 36] == pytest.approx(AGES[203])


def test_tensors_are_normalised_by_channel_and_numbers_alone(loaded):
    rows = loaded.train.images.double()
    assert loaded.mean[:36] == pytest.approx([float(rows[:, :36].mean())] * 36, rel=1e-5)
    assert loaded.std[:36] == pytest.approx([float(rows[:, :36].std(correction=0))] * 36, rel=1e-5)
    assert loaded.mean[36] == pytest.approx(float(rows[:, 36].mean()), rel=1e-5)
    assert loaded.std[37:42] == pytest.approx([float(rows[:, 37:42].std(correction=0))] * 5, rel=1e-5)


def test_a_network_is_called_by_name_and_its_ensemble_too(loaded, monkeypatch):
    monkeypatch.setattr("training.data.sources.find.import_string", lambda _: parts)
    network = networks.build("tests.training.data.forms.test_named:two", 3, loaded.input, {})
    batch = loaded.test.images[:4]
    by_hand = network.network(
        photo=batch[:, :36].reshape(4, 1, 6, 6), age=batch[:, 36:37], wave=batch[:, 37:].reshape(4, 2, 5)
    )
    torch.testing.assert_close(network.eval()(batch), by_hand)
    version = fge.run(
        fge.Config(
            name="named",
            dataset="mine:parts",
            network="tests.training.data.forms.test_named:two",
            epochs=8,
            members=2,
            batch_size=20,
        )
    )
    ensemble = modepath.ensemble.of_version(version)
    inputs = {
        "photo": PHOTOS[200:] / 255,
        "age": AGES[200:],
        "wave": loaded.test.images[:, 37:].reshape(-1, 2, 5).numpy(),
    }
    found = ensemble.predict(inputs)
    session = EnsembleSession(version.folder, version.manifest)
    assert found.probs == pytest.approx(session.predict(loaded.test.images.numpy()).mean_probs, abs=1e-5)
    assert (found.labels == LABELS[200:]).mean() > 0.6
    rows = [{name: value[i].tolist() for name, value in inputs.items()} for i in range(3)]
    assert ensemble.predict(rows).probs == pytest.approx(found.probs[:3], abs=1e-5)


def test_an_npz_file_may_hold_named_inputs(tmp_path):
    np.savez(tmp_path / "d.npz", **{"x/photo": PHOTOS, "x/age": AGES, "y": LABELS})
    found = data.load(DataOptions(f"npz:{tmp_path / 'd.npz'}"))
    assert [field.name for field in found.input.fields] == ["photo", "age"]
    assert len(found.test) == 48


def test_other_splits_follow_the_fields_of_the_train_split(monkeypatch):
    made = parts()
    made["test"] = (dict(reversed(made["test"][0].items())), made["test"][1])
    monkeypatch.setattr("training.data.sources.find.import_string", lambda _: lambda: made)
    assert data.load(DataOptions("mine:parts")).test.images[3, 36] == pytest.approx(AGES[203])
    del made["test"][0]["age"]
    with pytest.raises(DataError, match="the field 'age' is missing"):
        data.load(DataOptions("mine:parts"))


def test_a_network_without_these_names_is_refused(loaded):
    with pytest.raises(NetworkError, match=r"cannot be built|does not run"):
        networks.build("tests.training.other_networks:viewing", 3, loaded.input, {})
    assert networks.build("mlp", 3, loaded.input, {})(loaded.test.images[:2]).shape == (2, 3)


def only_numbers(num_classes, input_shape):
    assert input_shape == {"age": (1,), "size": (1,)}

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, num_classes)

        def forward(self, age, size):
            return self.layer(torch.cat([age, size], dim=1))

    return Sum()


def test_numbers_alone_are_passed_by_name_too(monkeypatch):
    made = {name: ({"age": AGES[:40], "size": AGES[:40, None]}, LABELS[:40]) for name in ("train", "test")}
    monkeypatch.setattr("training.data.sources.find.import_string", lambda _: lambda: made)
    loaded = data.load(DataOptions("mine:parts"))
    network = networks.build("tests.training.data.forms.test_named:only_numbers", 3, loaded.input, {})
    assert network(loaded.test.images).shape == (40, 3)
