"""Foreign models as other tools write them, each compared with what the original answers."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from models_store.errors import MemberError
from models_store.graphs.adapting import ImportOptions, adapt
from models_store.graphs.runtime import MemberSession
from models_store.inputs import fields, kinds
from models_store.uncertainty import softmax

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(48, 3)).astype(np.float32)
IMAGES = RNG.random((5, 3, 4, 4), dtype=np.float32)


def model(nodes, given, outputs, tensors=(), opset=18, extra=()):
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(tensors).items()]
    graph = helper.make_graph(nodes, "g", given, outputs, initializers)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*one) for one in extra)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def flat(name, *, kind=TensorProto.FLOAT, batch="batch", shape=(3, 4, 4), weights=WEIGHTS, opset=18):
    """flatten(x) @ weights."""
    array = {TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}.get(kind, np.float32)
    nodes = [helper.make_node("Flatten", [name], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    return model(
        nodes,
        [value(name, kind, [batch, *shape])],
        [value("y", kind, [batch, 3])],
        {"w": weights.astype(array)},
        opset,
    )


def adapted(tmp_path, original, **options):
    onnx.save(original, tmp_path / "m.onnx")
    return adapt(tmp_path / "m.onnx", ImportOptions(**options))


def answers(found, inputs):
    return MemberSession(found.model, "cpu").logits(kinds.arranged(found.spec, inputs))


def original_answers(original, output=0, **inputs):
    session = onnxruntime.InferenceSession(original.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate(
        [
            np.asarray(session.run(None, {name: rows[i : i + 1] for name, rows in inputs.items()})[output])
            for i in range(len(next(iter(inputs.values()))))
        ]
    )


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 19, 21, 22])
def test_other_operator_sets_are_converted(tmp_path, opset):
    original = flat("x", opset=opset)
    assert answers(adapted(tmp_path, original), IMAGES) == pytest.approx(original_answers(original, x=IMAGES), abs=1e-5)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_floats_are_cast(tmp_path, kind):
    original = flat("x", kind=kind)
    given = IMAGES.astype(np.float16 if kind == TensorProto.FLOAT16 else np.float64)
    expected = original_answers(original, x=given)
    assert answers(adapted(tmp_path, original), IMAGES) == pytest.approx(expected, rel=1e-2, abs=1e-2)


def bytes_model(shape=(3, 4, 4)):
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["f"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    given = [value("x", TensorProto.UINT8, ["batch", *shape])]
    return model(nodes, given, [value("y", TensorProto.FLOAT, ["batch", 3])], {"w": WEIGHTS / 255})


def test_bytes_get_the_levels_of_the_pixels(tmp_path):
    levels = RNG.integers(0, 256, IMAGES.shape).astype(np.uint8)
    expected = original_answers(bytes_model(), x=levels)
    found = answers(adapted(tmp_path, bytes_model()), levels / np.float32(255))
    assert found == pytest.approx(expected, abs=1e-4)


def test_pixels_up_to_255_are_scaled(tmp_path):
    original = flat("x", weights=WEIGHTS / 255)
    expected = original_answers(original, x=255 * IMAGES)
    assert answers(adapted(tmp_path, original, pixels=255), IMAGES) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["float", "bytes"])
def test_channels_in_the_last_axis_are_moved_there(tmp_path, kind):
    original = flat("x", shape=(4, 4, 3)) if kind == "float" else bytes_model((4, 4, 3))
    levels = np.rint(255 * IMAGES)
    images = IMAGES if kind == "float" else (levels / 255).astype(np.float32)
    given = images if kind == "float" else levels.astype(np.uint8)
    found = adapted(tmp_path, original, channels_last=True)
    assert found.spec.shape == (3, 4, 4)
    expected = original_answers(original, x=np.ascontiguousarray(given.transpose(0, 2, 3, 1)))
    assert answers(found, images) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_size_is_opened_where_only_reshapes_know_it(tmp_path, batch):
    nodes = [helper.make_node("Reshape", ["x", "s"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    given, out = [value("x", TensorProto.FLOAT, [batch, 3, 4, 4])], [value("y", TensorProto.FLOAT, [batch, 3])]
    original = model(nodes, given, out, {"w": WEIGHTS, "s": np.array([batch, 48])})
    found = answers(adapted(tmp_path, original), IMAGES)
    assert found == pytest.approx(IMAGES.reshape(5, -1) @ WEIGHTS, abs=1e-4)


def test_a_batch_size_that_cannot_be_opened_is_told(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["raw"]),
        helper.make_node("Add", ["raw", "b"], ["y"]),
    ]
    tensors = {"w": WEIGHTS, "s": np.array([-1, 48]), "b": np.ones((2, 3), np.float32)}
    given, out = [value("x", TensorProto.FLOAT, [2, 3, 4, 4])], [value("y", TensorProto.FLOAT, [2, 3])]
    with pytest.raises(MemberError, match="fixed batch size 2, and it cannot be opened"):
        adapted(tmp_path, model(nodes, given, out, tensors))


def test_logits_with_further_axes_of_one_are_flattened(tmp_path):
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["raw"]),
        helper.make_node("Unsqueeze", ["raw", "axes"], ["y"]),
    ]
    given, out = [value("x", TensorProto.FLOAT, ["n", 3, 4, 4])], [value("y", TensorProto.FLOAT, ["n", 3, 1, 1])]
    original = model(nodes, given, out, {"w": WEIGHTS, "axes": np.array([2, 3])})
    assert answers(adapted(tmp_path, original), IMAGES) == pytest.approx(IMAGES.reshape(5, -1) @ WEIGHTS, abs=1e-4)


def test_of_several_outputs_one_is_named(tmp_path):
    original = flat("x")
    original.graph.node.append(helper.make_node("Relu", ["flat"], ["features"]))
    original.graph.output.append(value("features", TensorProto.FLOAT, ["batch", 48]))
    with pytest.raises(MemberError, match="--output-name"):
        adapted(tmp_path, original)
    found = adapted(tmp_path, original, output_name="y")
    assert answers(found, IMAGES) == pytest.approx(IMAGES.reshape(5, -1) @ WEIGHTS, abs=1e-4)
    with pytest.raises(MemberError, match="no output 'z'; its outputs are y, features"):
        adapted(tmp_path, original, output_name="z")


def test_features_have_any_number_of_axes(tmp_path):
    for shape in ((48,), (6, 8)):
        original = flat("x", shape=shape)
        found = adapted(tmp_path, original)
        assert (found.spec.kind, found.spec.shape) == ("features", shape)
        rows = RNG.normal(size=(4, *shape)).astype(np.float32)
        assert answers(found, rows) == pytest.approx(rows.reshape(4, -1) @ WEIGHTS, abs=1e-4)


def text_model(*beside, dtype=TensorProto.INT64, length="length"):
    """The mean embedding of the tokens that the mask counts."""
    table = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["counts"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["counts", "last"], ["counted"]),
        helper.make_node("Mul", ["rows", "counted"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["counted", "one"], ["number"], keepdims=0),
        helper.make_node("Div", ["total", "number"], ["y"]),
    ]
    given = [value(name, dtype, ["batch", length]) for name in ("input_ids", "attention_mask", *beside)]
    tensors = {"table": table, "last": np.array([2]), "one": np.array([1])}
    return model(nodes, given, [value("y", TensorProto.FLOAT, ["batch", 3])], tensors), table


@pytest.mark.parametrize("dtype", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("beside", [(), ("token_type_ids",)])
def test_token_ids_bring_their_mask(tmp_path, dtype, beside):
    original, table = text_model(*beside, dtype=dtype)
    found = adapted(tmp_path, original, vocabulary=20, input_shape=(6,))
    assert (found.spec.kind, found.spec.shape, found.spec.open_length) == ("tokens", (6,), True)
    texts = [[3, 7], [1, 2, 3, 4, 5, 6], [19]]
    expected = np.stack([table[text].mean(axis=0) for text in texts])
    assert answers(found, kinds.from_texts(found.spec, texts)) == pytest.approx(expected, abs=1e-5)


def test_tokens_need_a_vocabulary_and_a_largest_length(tmp_path):
    original, _ = text_model()
    with pytest.raises(MemberError, match="--vocabulary"):
        adapted(tmp_path, original)
    with pytest.raises(MemberError, match="--input-shape LENGTH"):
        adapted(tmp_path, original, vocabulary=20)
    closed, _ = text_model(length=6)
    assert not adapted(tmp_path, closed, vocabulary=20).spec.open_length


@pytest.mark.parametrize("zipmap", [True, False])
@pytest.mark.parametrize("name", ["LogisticRegression", "RandomForestClassifier", "MLPClassifier"])
def test_classifiers_of_scikit_learn_answer_as_they_do(tmp_path, name, zipmap):
    skl2onnx = pytest.importorskip("skl2onnx", reason="the dev extra is not installed")
    from sklearn import datasets, ensemble, linear_model, neural_network

    classes = {
        "LogisticRegression": linear_model.LogisticRegression(max_iter=2000),
        "RandomForestClassifier": ensemble.RandomForestClassifier(5, random_state=0),
        "MLPClassifier": neural_network.MLPClassifier((8,), max_iter=50, random_state=0),
    }
    x, y = datasets.load_iris(return_X_y=True)
    with pytest.warns() if name == "MLPClassifier" else _nothing():
        trained = classes[name].fit(x, y)
    options = {id(trained): {"zipmap": zipmap}}
    original = skl2onnx.to_onnx(trained, x[:1].astype(np.float32), options=options)
    found = adapted(tmp_path, original, output="probs")
    probs = softmax(answers(found, x.astype(np.float32)))
    assert probs == pytest.approx(trained.predict_proba(x.astype(np.float32)), abs=1e-5)


class _nothing:  # noqa: N801
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize("batch", ["open", "fixed"])
def test_files_of_torchs_older_exporter_answer_as_torch_does(tmp_path, opset, batch):
    torch = pytest.importorskip("torch", reason="the training extra is not installed")
    pytest.importorskip("torchvision", reason="the training extra is not installed")
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()
    axes = {"x": {0: "batch"}, "y": {0: "batch"}} if batch == "open" else None
    torch.onnx.export(
        network, (torch.zeros(1, 3, 4, 4),), tmp_path / "m.onnx", dynamo=False, opset_version=opset, input_names=["x"],
        output_names=["y"], dynamic_axes=axes,
    )  # fmt: skip
    found = adapt(tmp_path / "m.onnx", ImportOptions())
    with torch.no_grad():
        expected = network(torch.from_numpy(IMAGES)).numpy()
    assert answers(found, IMAGES) == pytest.approx(expected, abs=1e-5)


def several(types=(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64), batch="batch", wave=5):
    """photo (1, 2, 2), wave (5,) and count () into three classes, by one linear layer."""
    nodes = [
        helper.make_node("Flatten", ["photo"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["wave"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["count"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["number", "last"], ["c"]),
        helper.make_node("Concat", ["a", "b", "c"], ["all"], axis=1),
        helper.make_node("MatMul", ["all", "w"], ["y"]),
    ]
    axes = ([batch, 1, 2, 2], [batch, wave], [batch])
    given = [value(name, kind, axis) for name, kind, axis in zip(("photo", "wave", "count"), types, axes, strict=True)]
    return model(nodes, given, [value("y", TensorProto.FLOAT, [batch, 3])], {"w": WEIGHTS[:10], "last": np.array([1])})


@pytest.mark.parametrize("batch", ["batch", 1])
@pytest.mark.parametrize("first", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_several_inputs_become_named_fields(tmp_path, batch, first):
    found = adapted(tmp_path, several((first, TensorProto.DOUBLE, TensorProto.INT64), batch))
    assert [(field.name, field.shape) for field in found.spec.fields or ()] == [
        ("photo", (1, 2, 2)),
        ("wave", (5,)),
        ("count", None),
    ]
    columns = {"photo": RNG.random((4, 1, 2, 2)), "wave": RNG.normal(size=(4, 5)), "count": [3, -1, 0, 7]}
    packed = fields.from_columns(columns, found.spec)
    by_hand = np.concatenate(
        [columns["photo"].reshape(4, 4), columns["wave"], np.array(columns["count"])[:, None]], axis=1
    )
    assert answers(found, packed) == pytest.approx(
        by_hand @ WEIGHTS[:10], abs=1e-2 if first == TensorProto.FLOAT16 else 1e-4
    )


def test_several_inputs_have_fixed_shapes_and_are_taken_as_they_are(tmp_path):
    with pytest.raises(MemberError, match="leaves an axis of 'wave' open"):
        adapted(tmp_path, several(wave="n"))
    with pytest.raises(MemberError, match="leave out --mean"):
        adapted(tmp_path, several(), mean=[0.0], std=[1.0])


@pytest.mark.parametrize("dtype", [TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8])
def test_integers_that_are_no_token_ids_are_features_on_request(tmp_path, dtype):
    nodes = [
        helper.make_node("Cast", ["counts"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    given = [value("counts", dtype, ["batch", 10])]
    original = model(nodes, given, [value("y", TensorProto.FLOAT, ["batch", 3])], {"w": WEIGHTS[:10]})
    found = adapted(tmp_path, original, kind="features")
    assert (found.spec.kind, found.spec.shape) == ("features", (10,))
    rows = RNG.integers(0, 200, (4, 10)).astype(np.float32)
    assert answers(found, rows) == pytest.approx(rows @ WEIGHTS[:10], rel=1e-4, abs=1e-3)
