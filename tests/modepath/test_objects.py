"""Networks, data and weights that are passed as objects."""

import pytest

pytest.importorskip("torch", reason="the training extra is not installed")

import torch
from safetensors.torch import load_file
from torch import nn

from modepath import objects
from training.data.import_string import import_string


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


def test_a_module_is_built_again_with_initial_weights_of_its_own_each_time():
    given = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    make = import_string(objects.network_name(given))
    weights = [make(2, (1, 2, 2))[1].weight for _ in range(2)]
    assert not torch.equal(*weights)
    assert all(not torch.equal(one, given[1].weight) for one in weights)


def test_a_module_whose_weights_cannot_be_drawn_again_is_refused_with_what_to_do():
    make = import_string(objects.network_name(Bare()))
    with pytest.raises(TypeError, match=r"'scale'.*reset_parameters.*make\(num_classes, input_shape\)"):
        make(2, (1, 2, 2))


def test_names_stay_and_other_things_are_no_networks():
    assert objects.network_name("preresnet8") == "preresnet8"
    assert objects.data_name("digits") == "digits"
    with pytest.raises(TypeError, match="int"):
        objects.network_name(3)


def test_equal_arrays_have_one_name_and_others_another():
    images, labels = torch.rand(4, 1, 2, 2), torch.arange(4)
    name = objects.data_name(((images, labels),) * 3)
    assert objects.data_name(((images.clone(), labels.clone()),) * 3) == name
    assert objects.data_name(((images + 1e-3, labels),) * 3) != name


def test_given_weights_are_kept_once_under_their_own_hash(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEPATH_RUNS", str(tmp_path))
    state = nn.Linear(3, 2).state_dict()
    file = objects.weights_file(state)
    assert objects.weights_file({name: tensor.clone() for name, tensor in state.items()}) == file
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(file).items())
    assert objects.weights_file(nn.Linear(3, 2).state_dict()) != file
    assert objects.weights_file("mine.pt").name == "mine.pt"
