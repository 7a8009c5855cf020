import subprocess
import sys

import numpy as np
import pytest

from models_store.errors import MemberError, ProviderError
from models_store.graphs import runtime
from models_store.graphs.runtime import EnsembleSession, MemberSession, in_batches
from models_store.uncertainty import combine, softmax
from tests.conftest import ROOT
from tests.onnx_members import SHAPE, linear, linear_logits, publish

images = np.random.default_rng(0).random((7, *SHAPE), dtype=np.float32)


def test_a_session_gives_the_members_logits():
    model = linear(0)
    assert MemberSession(model.SerializeToString(), "cpu").logits(images) == pytest.approx(
        linear_logits(model, images), abs=1e-5
    )


def test_an_ensemble_averages_probabilities_at_its_temperature(store):
    version = publish(store, "a", seeds=(0, 1, 2), temperature=2.5)
    session = EnsembleSession(version.folder, version.manifest, "cpu")
    expected = np.mean([softmax(linear_logits(linear(s), images), 2.5) for s in (0, 1, 2)], axis=0)
    assert session.combine(session.member_probs(images)).mean_probs == pytest.approx(expected, abs=1e-6)


def test_batches_change_nothing(store):
    version = publish(store, "a")
    session = EnsembleSession(version.folder, version.manifest, "cpu")
    assert in_batches(session, images, size=2) == pytest.approx(session.logits(images), abs=1e-6)
    assert in_batches(session, images, size=2).shape == (3, 7, 3)
    combine(softmax(in_batches(session, images)), np.full(3, 1 / 3))


def test_garbage_is_refused():
    with pytest.raises(MemberError):
        MemberSession(b"garbage", "cpu")


def test_cuda_asked_for_and_missing_is_an_error():
    if runtime._gpu_present():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ProviderError, match="cuda"):
        MemberSession(linear(0).SerializeToString(), "cuda")


def test_the_providers_in_use_are_told(store):
    version = publish(store, "a")
    assert EnsembleSession(version.folder, version.manifest, "cpu").providers == ["CPUExecutionProvider"]


GROWTH = """
import numpy as np, psutil
from onnx import TensorProto, helper, numpy_helper
from models_store.graphs.runtime import MemberSession

kernel = numpy_helper.from_array(np.full((64, 1, 3, 3), 0.1, np.float32), "kernel")
nodes = [
    helper.make_node("Conv", ["images", "kernel"], ["wide"], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["wide"], ["positive"]),
    helper.make_node("GlobalAveragePool", ["positive"], ["mean"]),
    helper.make_node("Flatten", ["mean"], ["logits"]),
]
shapes = [("images", ["batch", 1, 128, 128]), ("logits", ["batch", 64])]
values = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in shapes]
graph = helper.make_graph(nodes, "wide", *values, [kernel])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
sessions = [MemberSession(model, "cpu", threads=1, shares_arena=SHARED) for _ in range(20)]
images = np.ones((4, 1, 128, 128), np.float32)
sessions[0].logits(images)
before = psutil.Process().memory_info().rss
for session in sessions:
    session.logits(images)
print(psutil.Process().memory_info().rss - before)
"""


def test_sessions_that_share_an_arena_keep_activations_once():
    pytest.importorskip("psutil")
    grown = {
        shared: int(
            subprocess.run(
                [sys.executable, "-c", GROWTH.replace("SHARED", str(shared))], cwd=ROOT, capture_output=True, check=True
            ).stdout
        )
        for shared in (False, True)
    }
    activations = 4 * 64 * 128 * 128 * 4
    assert grown[False] > 15 * activations
    assert grown[True] < 3 * activations


def test_large_members_of_an_ensemble_share_an_arena(store, monkeypatch):
    version = publish(store, "a", seeds=(0, 1, 2))
    monkeypatch.setattr(runtime.merging, "MERGED_BYTES", 0)
    shared = []
    original = runtime._open
    monkeypatch.setattr(
        runtime, "_open", lambda *given, shares_arena: shared.append(shares_arena) or original(*given, shares_arena=shares_arena)
    )  # fmt: skip
    EnsembleSession(version.folder, version.manifest, "cpu", 2)
    assert shared == [True, True, True]
