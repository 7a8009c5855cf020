"""The number of threads of a member: what is chosen, kept and shared between processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import helper

from models_store import files
from models_store.errors import ProviderError
from models_store.graphs import threads
from models_store.graphs.runtime import EnsembleSession, Group, default_threads
from models_store.graphs.threads import Measured, choose
from models_store.manifest import InputSpec
from models_store.store import Store
from tests.conftest import ROOT
from tests.onnx_members import SHAPE, linear, publish

MODEL = linear(0).SerializeToString()
SPEC = InputSpec(shape=SHAPE)


@pytest.fixture
def counted(monkeypatch):
    """Every measurement that is made."""
    made = []
    original = threads._measure
    monkeypatch.setattr(threads, "_measure", lambda *given: made.append(given) or original(*given))
    return made


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ([[2.0, 1.0, 0.5], [20.0, 10.0, 5.0]], 4),  # ideal
        ([[0.20, 0.36, 0.5], [3.7, 2.9, 2.6]], 1),  # a small network
        ([[1.0, 0.95, 0.92], [10.0, 9.5, 9.3]], 1),  # nearly equal: fewer threads
        ([[1.0, 0.5, 0.5], [10.0, 5.0, 5.2]], 2),
    ],
)
def test_the_smallest_number_that_is_nearly_the_fastest_is_chosen(times, chosen):
    assert choose(times, (1, 2, 4)) == chosen


def test_a_measurement_is_kept_for_this_model_and_number_of_threads(tmp_path, counted):
    measured = Measured(SPEC, tmp_path / "deep/threads.json")
    first = measured(MODEL, 4)
    assert 1 <= first <= 4
    (tmp_path / "m.onnx").write_bytes(MODEL)
    assert measured(tmp_path / "m.onnx", 4) == first  # a file and its content are one model
    assert len(counted) == 1
    measured(linear(1).SerializeToString(), 4)  # other weights in the same network
    assert len(counted) == 1
    measured(MODEL, 2)
    other = linear(1)
    other.graph.node.append(helper.make_node("Identity", ["logits"], ["more"]))
    measured(other.SerializeToString(), 4)
    assert len(counted) == 3
    assert len(json.loads((tmp_path / "deep/threads.json").read_text())) == 3


def test_a_kept_number_is_read_while_another_process_measures(tmp_path, counted):
    measured = Measured(SPEC, tmp_path / "threads.json")
    chosen = measured(MODEL, 2)
    with files.locked(tmp_path / "threads.lock"):
        assert measured(MODEL, 2) == chosen
    assert len(counted) == 1


def test_a_cascade_and_members_of_several_structures_use_what_is_chosen_for_each(tmp_path):
    asked = []

    def choose(model, most):
        asked.append((model, most))
        return 1

    version = publish(Store(tmp_path), "a")
    Group(version.folder, version.manifest, [0], "cpu", 4, choose)
    assert asked == [(version.folder / "members/000.onnx", 4)]


@pytest.mark.parametrize("given", ["two", "-1", "1.5"])
def test_a_number_of_threads_that_is_not_one_is_refused(monkeypatch, given):
    monkeypatch.setenv("MODEPATH_THREADS", given)
    with pytest.raises(ProviderError, match="MODEPATH_THREADS must be a number of threads"):
        default_threads()


def test_one_thread_needs_no_measurement(tmp_path, counted):
    assert Measured(SPEC, tmp_path / "threads.json")(MODEL, 1) == 1
    assert not counted
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"}', "\0", "{"])
def test_a_damaged_file_is_measured_anew(tmp_path, counted, content):
    (tmp_path / "threads.json").write_text(content)
    assert 1 <= Measured(SPEC, tmp_path / "threads.json")(MODEL, 2) <= 2
    assert len(counted) == 1
    assert json.loads((tmp_path / "threads.json").read_text())


def test_a_number_that_is_kept_and_out_of_range_is_measured_anew(tmp_path, counted):
    measured = Measured(SPEC, tmp_path / "threads.json")
    measured(MODEL, 2)
    (key,) = json.loads((tmp_path / "threads.json").read_text())
    (tmp_path / "threads.json").write_text(json.dumps({key: 77}))
    assert 1 <= measured(MODEL, 2) <= 2
    assert len(counted) == 2


def test_where_nothing_can_be_written_it_is_measured_each_time(tmp_path, counted):
    (tmp_path / "file").touch()
    for kept in (tmp_path / "file/below/threads.json", None):
        assert 1 <= Measured(SPEC, kept)(MODEL, 2) <= 2
    assert len(counted) == 2


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ({"MODEPATH_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/threads.json"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/modepath/threads.json"),
        ({"HOME": "/c"}, "/c/.cache/modepath/threads.json"),
        ({}, "None"),
    ],
)
def test_the_folder_is_the_first_that_is_named(monkeypatch, given, file):
    for variable in ("MODEPATH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    assert str(Measured.of(SPEC).kept) == file


def test_processes_that_start_together_measure_once(tmp_path):
    program = (
        "from models_store.graphs import threads; from models_store.manifest import InputSpec; from tests.onnx_members import linear, SHAPE\n"
        "old = threads._measure\n"
        "def measure(*given):\n    print('measured'); return old(*given)\n"
        "threads._measure = measure\n"
        "threads.Measured.of(InputSpec(shape=SHAPE))(linear(0).SerializeToString(), 2)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "MODEPATH_CACHE": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]  # fmt: skip
    outputs = [one.communicate()[0] for one in running]
    assert all(one.returncode == 0 for one in running)
    assert "".join(outputs).count("measured") == 1


def test_an_ensemble_gives_each_member_the_chosen_threads_and_answers_the_same(store):
    version = publish(store, "a", seeds=(0,))
    images = np.random.default_rng(0).random((7, *SHAPE), dtype=np.float32)
    asked = []
    chosen = EnsembleSession(
        version.folder, version.manifest, "cpu", 4, choose=lambda model, most: asked.append(most) or 1
    )
    assert asked == [4]
    whole = EnsembleSession(version.folder, version.manifest, "cpu", 4)
    assert chosen.logits(images) == pytest.approx(whole.logits(images), abs=1e-6)
