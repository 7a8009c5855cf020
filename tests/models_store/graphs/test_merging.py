import numpy as np
import onnx
import onnxruntime
import pytest

from models_store.graphs import merging
from models_store.graphs.runtime import EnsembleSession, MemberSession
from models_store.manifest import InputSpec
from tests.onnx_members import SHAPE, linear, publish

IMAGES = InputSpec(shape=(1, 8, 8))

images = np.random.default_rng(0).random((7, *SHAPE), dtype=np.float32)


def save(folder, models):
    files = []
    for number, model in enumerate(models):
        files.append(folder / f"{number}.onnx")
        onnx.save(model, files[-1])
    return files


def test_a_merged_graph_answers_as_its_members_do_to_the_last_bit(tmp_path):
    files = save(tmp_path, [linear(seed) for seed in range(5)])
    model = merging.merged(merging.load_to_merge(files))
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    found = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"images": images})
    for file, logits in zip(files, found, strict=True):
        assert (logits == MemberSession(file, "cpu").logits(images)).all()


@pytest.mark.parametrize("members", [1, 2, 5, 7])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("bound", [0, 2**30])
def test_merged_or_not_an_ensemble_gives_its_members_in_their_order(store, monkeypatch, members, threads, bound):
    monkeypatch.setattr(merging, "MERGED_BYTES", bound)
    version = publish(store, "a", seeds=range(members))
    session = EnsembleSession(version.folder, version.manifest, "cpu", threads)
    assert len(session.parts) == (min(members, threads) if bound else members)
    expected = [MemberSession(version.folder / m.file, "cpu").logits(images) for m in version.manifest.members]
    assert (session.logits(images) == np.stack(expected)).all()


def test_networks_of_every_kind_merge(tmp_path):
    torch = pytest.importorskip("torch", reason="the training extra is not installed")
    from torch import nn

    from training.members.export import Normalised, to_onnx

    class Rows(nn.Module):
        """An LSTM that reads an image row by row."""

        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.cell(x.flatten(1, 2))[0][:, -1])

    class Tokens(nn.Module):
        """A transformer over the rows of an image."""

        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(x.flatten(1, 2)).mean(dim=1))

    files = []
    for number, make in enumerate((Rows, Tokens, Rows)):
        torch.manual_seed(number)
        files.append(tmp_path / f"{number}.onnx")
        files[-1].write_bytes(to_onnx(Normalised(make(), (0.5,), (0.5,)), IMAGES))
    batch = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    model = merging.merged(merging.load_to_merge(files))
    found = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"images": batch})
    for file, logits in zip(files, found, strict=True):
        assert logits == pytest.approx(MemberSession(file, "cpu").logits(batch), abs=1e-6)


def test_models_that_onnx_cannot_join_run_one_by_one(tmp_path):
    from onnx import TensorProto, helper

    plain = linear(0)
    branching = linear(1)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["logits_"], ["out"])],
        "b",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    branching.graph.node[-1].output[0] = "logits_"
    condition = helper.make_tensor("always", TensorProto.BOOL, [], [True])
    branching.graph.initializer.append(condition)
    branching.graph.node.append(helper.make_node("If", ["always"], ["logits"], then_branch=branch, else_branch=branch))
    calling = linear(2)
    calling.functions.append(
        helper.make_function(
            "mine", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 18)]
        )
    )
    for other in (branching, calling):
        files = save(tmp_path, [plain, other])
        assert merging.load_to_merge(files) is None
    assert len(merging.load_to_merge(save(tmp_path, [plain, linear(3)]))) == 2


def heads(count, width=40):
    """Members with one body and different heads."""
    body = np.random.default_rng(9).normal(size=(16, width)).astype(np.float32)
    made = []
    for seed in range(count):
        head = np.random.default_rng(seed).normal(size=(width, 3)).astype(np.float32)
        helper = onnx.helper
        nodes = [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "body"], ["features"]),
            helper.make_node("Relu", ["features"], ["seen"]),
            helper.make_node("MatMul", ["seen", "head"], ["logits"]),
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", *SHAPE])],
            [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3])],
            [onnx.numpy_helper.from_array(body, "body"), onnx.numpy_helper.from_array(head, "head")],
        )
        made.append(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    return made


def test_a_backbone_that_members_share_is_computed_once_and_they_answer_as_before(tmp_path):
    models = heads(6)
    files = save(tmp_path, models)
    model = onnx.load_from_string(merging.merged(merging.load_to_merge(files)))
    assert [node.op_type for node in model.graph.node].count("Relu") == 1
    assert len(model.graph.initializer) == 1 + 6
    found = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"images": images}
    )
    for file, logits in zip(files, found, strict=True):
        assert logits == pytest.approx(MemberSession(file, "cpu").logits(images), abs=1e-5)


def test_members_that_share_most_weights_are_merged_whatever_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "MERGED_BYTES", 100)
    assert merging.load_to_merge(save(tmp_path, heads(3))) is not None
    assert merging.load_to_merge(save(tmp_path, [linear(seed) for seed in range(3)])) is None
    assert merging.load_to_merge(save(tmp_path, heads(1))) is None


def test_equal_members_are_each_an_output(tmp_path):
    files = save(tmp_path, [linear(0)] * 3)
    found = onnxruntime.InferenceSession(
        merging.merged(merging.load_to_merge(files)), providers=["CPUExecutionProvider"]
    ).run(None, {"images": images})
    assert len(found) == 3
    assert (found[0] == found[2]).all()


def test_nodes_that_leave_out_different_outputs_are_not_joined(tmp_path):
    helper, rng = onnx.helper, np.random.default_rng(0)
    tensors = {"w": rng.normal(size=(1, 12, 4)), "r": rng.normal(size=(1, 12, 3)), "shape": None}

    def member(*outputs):
        nodes = [
            helper.make_node("Squeeze", ["images", "one"], ["rows"]),
            helper.make_node("Transpose", ["rows"], ["steps"], perm=[1, 0, 2]),
            helper.make_node("LSTM", ["steps", "w", "r"], list(outputs), hidden_size=3),
            helper.make_node("Squeeze", ["h", "zero"], ["raw"]),
            helper.make_node("Clip", ["raw", "", "most"], ["logits"]),
        ]
        made = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items() if v is not None]
        made += [onnx.numpy_helper.from_array(np.array([v]), k) for k, v in (("one", 1), ("zero", 0))]
        made.append(onnx.numpy_helper.from_array(np.float32(0.5), "most"))
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", *SHAPE])],
            [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3])],
            made,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    for order in (("", "h"), ("y", "h")), (("y", "h"), ("", "h")):
        files = save(tmp_path, [member(*outputs) for outputs in order])
        found = onnxruntime.InferenceSession(
            merging.merged(merging.load_to_merge(files)), providers=["CPUExecutionProvider"]
        ).run(None, {"images": images})
        for file, logits in zip(files, found, strict=True):
            assert logits == pytest.approx(MemberSession(file, "cpu").logits(images), abs=1e-6)
