"""Members built with onnx only, so that the store and the service can be tested without torch."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from models_store import manifest
from models_store.bank import Bank
from models_store.manifest import ONNX_OPSET, Draft, Geometry, InputSpec, Member, Origin

SHAPE = (1, 4, 4)
CLASSES = 3


def linear(
    seed,
    shape=SHAPE,
    classes=CLASSES,
    *,
    opset=18,
    input_name="images",
    output_name="logits",
    softmax=False,
    batch="batch",
):
    """flatten(images) @ weights + bias."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(int(np.prod(shape)), classes)).astype(np.float32)
    bias = rng.normal(size=classes).astype(np.float32)
    last = "raw" if softmax else output_name
    nodes = [
        helper.make_node("Flatten", [input_name], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], [last]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["raw"], [output_name], axis=1))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def linear_logits(model, images):
    """Logits of a `linear` model, computed in numpy."""
    weights, bias = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    return images.reshape(len(images), -1) @ weights + bias


def bank(points=5, shape=SHAPE, classes=CLASSES, vertices=3, seed=0, **changes):
    """A bank of linear networks, logits = flatten(images) @ w + shift: w is interpolated, each point has a shift."""
    size = int(np.prod(shape))
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["scores"]),
            helper.make_node("Add", ["scores", "shift"], ["logits"]),
        ],
        "template",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
    )
    for name, dims in {"w": (size, classes), "shift": (classes,)}.items():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="given-from-memory")
        graph.initializer.append(tensor)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=10)
    rng = np.random.default_rng(seed)
    fields = {
        "template": model.SerializeToString(),
        "vertices": {"w": rng.normal(size=(vertices, size, classes)).astype(np.float32)},
        "statistics": {"shift": rng.normal(size=(points, classes)).astype(np.float32)},
        "coefficients": rng.dirichlet(np.ones(vertices), points),
        "temperature": rng.uniform(0.5, 2, points),
        "accuracy": np.ones(points),
        "nll": np.ones(points),
    }
    return Bank(**{**fields, **changes})


def point_logits(bank, point, images):
    """Logits of a point of a `bank`, computed in numpy."""
    w = np.tensordot(bank.coefficients[point], bank.vertices["w"].astype(np.float64), 1)
    return images.reshape(len(images), -1) @ w + bank.statistics["shift"][point]


def of_features(seed, spec):
    """flatten(inputs) @ weights + bias; a missing feature counts as 0."""
    model = linear(seed, spec.shape, input_name="inputs")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    model.graph.node.insert(0, helper.make_node("IsNaN", ["inputs"], ["gaps"]))
    model.graph.node.insert(1, helper.make_node("Where", ["gaps", "zero", "inputs"], ["known"]))
    model.graph.node[2].input[0] = "known"
    return model


def of_tokens(seed, spec):
    """The mean of the tokens' embeddings."""
    table = np.random.default_rng(seed).normal(size=(spec.vocabulary, CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "inputs"], ["rows"]),
        helper.make_node("Greater", ["inputs", "padding"], ["is_token"]),
        helper.make_node("Cast", ["is_token"], ["counted"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["counted", "last"], ["of_rows"]),
        helper.make_node("Mul", ["rows", "of_rows"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["of_rows", "one"], ["number"], keepdims=0),
        helper.make_node("Div", ["total", "number"], ["logits"]),
    ]
    tensors = {"table": table, "padding": np.int64(0), "last": np.array([2]), "one": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info("inputs", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=8)


def nan_on_white(seed, shape=SHAPE):
    """A `linear` member that answers an image with NaN if all its pixels are 1."""
    model = linear(seed, shape)
    graph = model.graph
    graph.node[-1].output[0] = "scores"
    for name, value in {
        "axes": np.array([1, 2, 3]),
        "one": np.float32(1),
        "nothing": np.float32(0),
        "last": np.array([1]),
    }.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    steps = [
        ("ReduceMin", ["images", "axes"], "least"), ("Sub", ["one", "least"], "gap"), ("Log", ["gap"], "log"),
        ("Mul", ["log", "nothing"], "zero"), ("Unsqueeze", ["zero", "last"], "column"), ("Add", ["scores", "column"], "logits"),
    ]  # fmt: skip
    for kind, given, made in steps:
        graph.node.append(helper.make_node(kind, given, [made], **({"keepdims": 0} if kind == "ReduceMin" else {})))
    return model


def publish(
    store,
    name,
    seeds=(0, 1, 2),
    *,
    temperature=1.0,
    shape=SHAPE,
    activate=True,
    bank=None,
    member=linear,
    shape_of_path="simplex",
    spec=None,
    tokenizer=None,
):
    """Publish an ensemble of linear members, or of those that `member` makes of a seed and a shape; optionally with a bank."""
    with store.staging(name) as staged:
        (staged / "members").mkdir()
        if tokenizer:
            (staged / manifest.TOKENIZER_FILE).write_bytes(tokenizer)
        members = []
        for index, seed in enumerate(seeds):
            file = f"members/{index:03d}.onnx"
            onnx.save(member(seed, spec or shape), staged / file)
            members.append(Member(file=file, origin=Origin(cycle=index + 1), weight=1 / len(seeds)))
        draft = Draft(
            method="fge",
            input=spec or InputSpec(shape=shape),
            classes=["cat", "dog", "bird"],
            members=members,
            temperature=temperature,
            geometry=bank and Geometry(shape=shape_of_path, vertices=["vertices/000.safetensors"], components=[[0]]),
            bank=bank and manifest.Bank(points=len(bank), accuracy_mean=1, accuracy_min=1),
        )
        if bank:
            bank.save(staged / "bank")
            (staged / "vertices").mkdir()
            save_file(bank.vertices, staged / "vertices/000.safetensors")
        return store.publish(name, Path(staged), draft, activate=activate)


def publish_broken(store, name, *, nan=False, squeezed=False, loop=0, on_white=False, allocated=0, surrogate=False):
    """Publish an ensemble whose one member passes the ONNX checker but misbehaves.

    Args:
        store: the store.
        name: name of the ensemble.
        nan: it returns NaN.
        squeezed: it returns one row for all images.
        loop: it runs a loop this many times.
        on_white: it does so for white images only.
        allocated: it allocates a tensor of this many floats.
        surrogate: a class name is not valid Unicode.
    """
    model = linear(0)
    graph = model.graph
    extra = "zero"
    if nan:
        weights = numpy_helper.to_array(graph.initializer[0]).copy()
        weights[0, 0] = np.nan
        graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "weights"))
    graph.node[-1].output[0] = "scores"
    if squeezed:
        graph.initializer.append(numpy_helper.from_array(np.array([1, -1], np.int64), "flat_shape"))
        graph.node.append(helper.make_node("Reshape", ["scores", "flat_shape"], ["logits"]))
        return _publish_one(store, name, model, surrogate)
    graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    if loop:
        item = helper.make_tensor_value_info
        body = helper.make_graph(
            [helper.make_node("Identity", ["on"], ["on_out"]), helper.make_node("Mul", ["x", "x"], ["x_out"])],
            "body",
            [item("i", TensorProto.INT64, []), item("on", TensorProto.BOOL, []), item("x", TensorProto.FLOAT, [])],
            [item("on_out", TensorProto.BOOL, []), item("x_out", TensorProto.FLOAT, [])],
        )
        graph.initializer.append(numpy_helper.from_array(np.int64(loop), "times"))
        graph.initializer.append(numpy_helper.from_array(np.bool_(True), "on_and_on"))
        # Starts from a value that depends on the input; otherwise it would be computed when the model is loaded.
        graph.node.append(helper.make_node("ReduceMin", ["images"], ["least"], keepdims=0))
        graph.node.append(helper.make_node("Mul", ["least", "nothing"], ["begin"]))
        times = "times"
        if on_white:
            graph.node.append(helper.make_node("Floor", ["least"], ["white"]))
            graph.node.append(helper.make_node("Cast", ["white"], ["white_or_not"], to=TensorProto.INT64))
            graph.node.append(helper.make_node("Mul", ["times", "white_or_not"], [times := "times_if_white"]))
        graph.node.append(helper.make_node("Loop", [times, "on_and_on", "begin"], [extra], body=body))
    elif allocated:
        graph.initializer.append(numpy_helper.from_array(np.array([allocated], np.int64), "size"))
        graph.node.append(helper.make_node("ReduceMin", ["images"], ["least"], keepdims=0))
        graph.node.append(helper.make_node("Expand", ["least", "size"], ["large"]))
        graph.node.append(helper.make_node("ReduceMax", ["large"], ["most"], keepdims=0))
        graph.node.append(helper.make_node("Mul", ["most", "nothing"], [extra]))
    else:
        graph.node.append(helper.make_node("Identity", ["nothing"], [extra]))
    graph.node.append(helper.make_node("Add", ["scores", extra], ["logits"]))
    return _publish_one(store, name, model, surrogate)


def _publish_one(store, name, model, surrogate):
    with store.staging(name) as staged:
        (staged / "members").mkdir()
        onnx.save(model, staged / "members/000.onnx")
        member = Member(file="members/000.onnx", origin=Origin(), weight=1)
        draft = Draft(method="import", input=InputSpec(shape=SHAPE), classes=["cat", "dog", "bird"], members=[member])
        version = store.publish(name, Path(staged), draft, self_test=False)  # it may never return
    if surrogate:
        manifest = version.folder / "manifest.json"
        manifest.write_bytes(manifest.read_bytes().replace(b'"dog"', b'"\\ud800"'))
    return version
