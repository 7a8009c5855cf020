"""The Python API as users see it: in their own folder, with their own modules and data."""

import os
import subprocess
import sys
import typing

import numpy as np
import pytest

import modepath
from models_store.decisions.calibrating import Labelled, calibrate
from models_store.errors import StoreError
from models_store.uncertainty import combine, softmax
from tests.conftest import ROOT
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import linear, linear_logits, publish
from tests.service.test_cascade import reference

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import modepath

def make(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, num_classes))

def split(count, seed):
    images = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(images, (images.mean((1, 2, 3)) > 0.5).long())

train, validation, test = split(256, 0), split(64, 1), split(64, 2)
pets = modepath.fge(network=make, data=(train, validation, test), epochs=4, members=2, batch_size=32, name="pets", activate_anyway=True)
pets = modepath.load("pets"); answer = pets.predict(test.tensors[0])
print("shape", answer.probs.shape, answer.mutual_information.shape)
report = modepath.evaluate("pets", data=test)
print("images", report["images"])
"""
THEIRS = {
    "training.py": "x = 1",
    "training/data.py": "x = 1",
    "training/__init__.py": "",
    "service.py": "x = 1",
    "data.py": "x = 1",
}
LAYOUTS = [("training.py", "data.py"), ("training/__init__.py", "training/data.py"), ("service.py",)]


@pytest.fixture
def folder(tmp_path):
    """The user's folder, outside the checkout."""
    made = tmp_path / "elsewhere"
    made.mkdir()
    return made


def run(folder, *command):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "MODELS_STORE": str(folder / "store"),
        "MODEPATH_RUNS": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_example_runs_as_a_script_and_again_finds_what_it_published(folder):
    pytest.importorskip("torch", reason="the training extra is not installed")
    (folder / "mine.py").write_text(SCRIPT)
    for output in ("published pets@1", "already finished: this run published pets@1"):
        done = run(folder, sys.executable, "mine.py")
        assert done.returncode == 0, done.stdout + done.stderr
        assert output in done.stdout
        assert "shape (64, 2) (64,)" in done.stdout
        assert "images 64" in done.stdout
    changed = SCRIPT.replace("nn.Linear(36, 16)", "nn.Linear(36, 8)").replace("nn.Linear(16, num", "nn.Linear(8, num")
    (folder / "mine.py").write_text(changed)
    assert "published pets@2" in run(folder, sys.executable, "mine.py").stdout


@pytest.mark.parametrize("names", LAYOUTS)
def test_modules_of_the_user_with_the_names_of_ours_break_nothing_and_stay_theirs(folder, names):
    pytest.importorskip("torch", reason="the training extra is not installed")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(THEIRS[name])
    theirs = names[-1].removesuffix(".py").replace("/", ".")
    before = "import training\n" if "training" in names[0] else ""
    (folder / "mine.py").write_text(f"{before}{SCRIPT}\nimport {theirs}\nprint('theirs', {theirs}.x)\n")
    done = run(folder, sys.executable, "mine.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "theirs 1" in done.stdout


def test_the_example_runs_as_a_notebook(folder, monkeypatch):
    pytest.importorskip("torch", reason="the training extra is not installed")
    nbformat = pytest.importorskip("nbformat", reason="part of the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="part of the dev extra")
    monkeypatch.setenv("MODELS_STORE", str(folder / "store"))
    monkeypatch.setenv("MODEPATH_RUNS", str(folder / "runs"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SCRIPT)])
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    (cell,) = notebook.cells
    printed = "".join(output.get("text", "") for output in cell.outputs)
    assert "shape (64, 2) (64,)" in printed


def test_importing_it_loads_neither_torch_nor_bentoml():
    code = "import sys, modepath; print({'torch', 'bentoml', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_an_ensemble_answers_as_its_members_do(store):
    version = publish(store, "animals", seeds=(0, 1), temperature=1.5)
    images = np.random.default_rng(0).random((5, 1, 4, 4), np.float32)
    probs = softmax(np.stack([linear_logits(linear(seed), images) for seed in (0, 1)]), 1.5)
    expected = combine(probs, np.array([0.5, 0.5]))
    answer = modepath.load("animals", store=store.root).predict(images, batch_size=2)
    assert answer.probs == pytest.approx(expected.mean_probs, abs=1e-6)
    assert answer.mutual_information == pytest.approx(expected.mutual_information, abs=1e-6)
    assert answer.member_probs == pytest.approx(probs, abs=1e-6)
    assert answer.class_names == [version.manifest.classes[label] for label in answer.labels]
    assert len(answer) == 5


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((1, 4, 4)), "shape"),
        (np.zeros((0, 1, 4, 4)), "shape"),
        (np.full((1, 1, 4, 4), 255.0), "Divide bytes by 255"),
        (np.full((1, 1, 4, 4), np.nan), "pixels"),
        (np.array([["a"]]), "type"),
    ],
)
def test_images_that_it_cannot_take_are_refused_with_the_reason(store, images, said):
    publish(store, "animals")
    with pytest.raises(ValueError, match=said):
        modepath.load("animals", store=store.root).predict(images)


@pytest.mark.parametrize("rule", ["calibrated", "exact"])
def test_a_cascade_answers_as_one_image_after_another(store, rule):
    x, y = labelled(4000, temperature=0.1)
    plain = publish(store, "many", seeds=(0, 0, 1, 0, 0, 2, 0, 3), temperature=0.05)
    version = calibrate(store, plain, Labelled(x, y, "these"))
    images = np.random.default_rng(1).random((300, 1, 4, 4), np.float32)
    probs, labels, confidence, used, nearest = reference(version, images, rule)
    safe = nearest > 1e-5  # rounding may decide others
    answer = modepath.load("many", store=store.root).predict(images, batch_size=70, cascade=rule)
    assert answer.probs[safe] == pytest.approx(probs[safe], abs=1e-5)
    assert answer.labels[safe].tolist() == labels[safe].tolist()
    assert answer.confidence[safe] == pytest.approx(confidence[safe], abs=1e-5)
    assert answer.members_used[safe].tolist() == used[safe].tolist()
    assert rule == "exact" or len(set(used.tolist())) > 1
    assert (np.isfinite(answer.member_probs[:, :, 0]).sum(axis=0) == answer.members_used).all()


def test_a_cascade_that_does_not_exist_or_does_not_fit_is_refused(store):
    publish(store, "animals")
    ensemble = modepath.load("animals", store=store.root)
    images = np.zeros((1, 1, 4, 4), np.float32)
    with pytest.raises(ValueError, match="models_store calibrate animals"):
        ensemble.predict(images, cascade="exact")
    with pytest.raises(ValueError, match="leave cascade out"):
        ensemble.predict(images, cascade="exact", risk=0.1)


def test_all_errors_have_one_root(store):
    with pytest.raises(modepath.ModepathError):
        modepath.load("nobody", store=store.root)
    assert issubclass(StoreError, modepath.ModepathError)


METHODS = ["fge", "independent", "snapshot", "curve", "espro", "swag", "csgmcmc", "soup"]


@pytest.mark.parametrize("method", METHODS)
def test_the_options_that_editors_show_are_those_of_the_command(method):
    pytest.importorskip("torch", reason="the training extra is not installed")
    import importlib

    from modepath import options

    fields = typing.get_type_hints(importlib.import_module(f"training.{method}").Config)
    fields = {name: kind for name, kind in fields.items() if typing.get_origin(kind) is not typing.ClassVar}
    shown = typing.get_type_hints(getattr(options, f"{method.capitalize()}Options"))
    given = {"name", "network", "dataset", "loss"}  # parameters of the function that accept objects
    assert shown.keys() == fields.keys() - given
    different = {name for name in shown if shown[name] != fields[name]}
    assert different <= {"init"}  # the API also accepts a state dict
