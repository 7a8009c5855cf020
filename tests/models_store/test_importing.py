import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models_store.errors import MemberError
from models_store.graphs.adapting import ImportOptions
from models_store.graphs.runtime import EnsembleSession
from models_store.importing import import_members
from models_store.uncertainty import softmax
from tests.models_store.test_file_kind import HTML, LFS, zipped
from tests.onnx_members import SHAPE, linear, linear_logits

images = np.random.default_rng(0).random((6, *SHAPE), dtype=np.float32)


def saved(tmp_path, *models):
    files = []
    for index, model in enumerate(models):
        files.append(tmp_path / f"foreign-{index}.onnx")
        onnx.save(model, files[-1])
    return files


def answer(version):
    session = EnsembleSession(version.folder, version.manifest, "cpu")
    return session.combine(session.member_probs(images)).mean_probs


def test_foreign_names_and_opsets_are_brought_to_the_contract(store, tmp_path):
    models = [
        linear(0, input_name="x", output_name="y", opset=13),
        linear(1, input_name="logits", output_name="images"),
        linear(2),
    ]
    version = import_members(store, "zoo", saved(tmp_path, *models), ImportOptions())
    store.verify(version)
    expected = np.mean([softmax(linear_logits(m, images)) for m in models], axis=0)
    assert answer(version) == pytest.approx(expected, abs=1e-5)
    assert [m.origin.source for m in version.manifest.members] == [f"foreign-{i}.onnx" for i in range(3)]


def test_normalisation_is_put_in_the_graph(store, tmp_path):
    model = linear(0)
    version = import_members(store, "zoo", saved(tmp_path, model), ImportOptions(mean=[0.3], std=[0.2]))
    assert answer(version) == pytest.approx(softmax(linear_logits(model, (images - 0.3) / 0.2)), abs=1e-5)


def test_a_model_that_ends_in_softmax_keeps_its_probabilities(store, tmp_path):
    version = import_members(store, "zoo", saved(tmp_path, linear(0, softmax=True)), ImportOptions(output="probs"))
    assert answer(version) == pytest.approx(softmax(linear_logits(linear(0), images)), abs=1e-5)


def test_weights_beside_the_graph_are_taken_in(store, tmp_path):
    file = tmp_path / "m.onnx"
    onnx.save(linear(0), file, save_as_external_data=True, location="m.bin", size_threshold=0)
    version = import_members(store, "zoo", [file], ImportOptions())
    (tmp_path / "m.bin").unlink()
    assert answer(version) == pytest.approx(softmax(linear_logits(linear(0), images)), abs=1e-5)


@pytest.mark.parametrize(
    ("models", "options", "told"),
    [
        ([linear(0), linear(1, shape=(1, 5, 5))], ImportOptions(), "same inputs"),
        ([linear(0), linear(1, classes=4)], ImportOptions(), "same classes"),
        ([linear(0)], ImportOptions(classes=["a", "b"]), "2 class names"),
        ([linear(0)], ImportOptions(mean=[0.1, 0.2]), "one per channel"),
        ([linear(0)], ImportOptions(input_shape=(3, 4, 4)), "takes images"),
    ],
)
def test_what_cannot_be_a_member_is_refused_with_the_reason(store, tmp_path, models, options, told):
    with pytest.raises(MemberError, match=told):
        import_members(store, "zoo", saved(tmp_path, *models), options)
    assert store.names() == []


def test_nan_answers_are_refused(store, tmp_path):
    model = linear(0)
    broken = onnx.numpy_helper.from_array(np.full((16, 3), np.nan, np.float32), "weights")
    model.graph.initializer[0].CopyFrom(broken)
    with pytest.raises(MemberError, match="NaN"):
        import_members(store, "zoo", saved(tmp_path, model), ImportOptions())


def graph_of(nodes, shape=SHAPE, classes=3, tensors=(), batch="batch"):
    """A model that consists of these nodes, with input `x` and output `y`."""
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", classes]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(tensors).items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


WEIGHTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
AXIS = np.array([0], np.int64)


def ending(*operators):
    """A linear network followed by these operators."""
    names = [*(f"end{i}" for i in range(len(operators))), "y"]
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], [names[0]])]
    nodes += [helper.make_node(op, [a], [b]) for op, a, b in zip(operators, names, names[1:], strict=False)]
    return graph_of(nodes, tensors={"w": WEIGHTS})


def beginning(*nodes, **tensors):
    """A linear network preceded by these nodes, with input `x` and output `z`."""
    rest = [helper.make_node("Flatten", ["z"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    return graph_of([*nodes, *rest], tensors={"w": WEIGHTS, **tensors})


MINUS_MEAN = [helper.make_node("ReduceMean", ["x", "axis"], ["m"]), helper.make_node("Sub", ["x", "m"], ["z"])]
BY_LARGEST = [helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0), helper.make_node("Div", ["x", "m"], ["z"])]
# For one image, the squeeze also removes the batch axis.
SQUEEZED = [
    helper.make_node("Flatten", ["x"], ["flat"]),
    helper.make_node("MatMul", ["flat", "w"], ["raw"]),
    helper.make_node("Squeeze", ["raw"], ["y"]),
]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (beginning(*MINUS_MEAN, axis=AXIS), "alone and with other images"),
        (beginning(*BY_LARGEST), "alone and with other images"),
        (graph_of(SQUEEZED, tensors={"w": WEIGHTS}), r"one image with an array \(3,\)"),
    ],
    ids=["mean over the batch", "largest pixel of the batch", "squeeze"],
)
def test_models_that_mix_the_images_of_a_batch_are_refused(store, tmp_path, model, told):
    with pytest.raises(MemberError, match=told):
        import_members(store, "zoo", saved(tmp_path, model), ImportOptions())
    assert store.names() == []


@pytest.mark.parametrize(
    ("models", "probs", "told"),
    [
        ([ending("Softmax")], False, r"foreign-0.onnx gives probabilities.*--output probs"),
        ([ending("Softmax", "Identity")], False, r"--output probs"),
        ([linear(0), linear(1, softmax=True)], False, r"foreign-0.onnx gives logits, but foreign-1.onnx gives probabilities"),
        ([linear(0), linear(1, softmax=True)], True, r"foreign-0.onnx gives logits, but foreign-1.onnx gives probabilities"),
        ([linear(0, softmax=True), linear(1)], True, r"foreign-1.onnx gives logits, but foreign-0.onnx"),
        ([linear(0)], True, "leave out --output probs"),
        ([ending("LogSoftmax")], True, "leave out --output probs"),
        ([ending("Sigmoid")], False, "sigmoid"),
        ([ending("Sigmoid")], True, "sigmoid"),
    ],
)  # fmt: skip
def test_outputs_of_another_kind_than_said_are_refused(store, tmp_path, models, probs, told):
    with pytest.raises(MemberError, match=told):
        import_members(store, "zoo", saved(tmp_path, *models), ImportOptions(output="probs" if probs else "logits"))
    assert store.names() == []


def test_log_probabilities_are_logits(store, tmp_path):
    version = import_members(store, "zoo", saved(tmp_path, ending("LogSoftmax")), ImportOptions())
    assert answer(version) == pytest.approx(softmax(images.reshape(6, -1) @ WEIGHTS), abs=1e-5)


@pytest.mark.parametrize("shape", [(8, 8, 3), (28, 28, 1), (8, 6, 4)])
def test_channels_in_the_last_axis_are_asked_about(store, tmp_path, shape):
    files = saved(tmp_path, linear(0, shape=shape))
    with pytest.raises(MemberError, match=r"last axis.*--channels-last.*--input-shape"):
        import_members(store, "zoo", files, ImportOptions())
    assert import_members(store, "zoo", files, ImportOptions(input_shape=shape)).manifest.input.shape == shape


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28), (4, 6, 3), (8, 6, 5)])
def test_channels_in_the_first_axis_are_taken_as_they_are(store, tmp_path, shape):
    version = import_members(store, "zoo", saved(tmp_path, linear(0, shape=shape)), ImportOptions())
    assert version.manifest.input.shape == shape


def test_a_batch_of_minus_one_is_open_and_unused_operator_sets_are_forgotten(store, tmp_path):
    model = linear(0, batch=-1)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    version = import_members(store, "zoo", saved(tmp_path, model), ImportOptions())
    store.verify(version)
    assert answer(version) == pytest.approx(softmax(linear_logits(linear(0), images)), abs=1e-5)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (LFS, "git-lfs pointer.*git lfs pull"),
        (HTML, "HTML page"),
        (zipped("net/data.pkl", "net/constants.pkl", "net/code/net.py"), "TorchScript archive"),
        (zipped("net/data.pkl"), "torch.save.*--init"),
        (b"\x00\x01 noise \xff", "cannot be read as ONNX"),
    ],
)
def test_files_that_are_no_onnx_are_named_for_what_they_are(store, tmp_path, content, told):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(MemberError, match=told):
        import_members(store, "zoo", [tmp_path / "m.onnx"], ImportOptions())
