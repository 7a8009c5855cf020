"""Members made with onnx alone, so that the store and the service are tested where torch is not installed."""

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
    """The same in numpy."""
    weights, bias = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    return images.reshape(len(images), -1) @ weights + bias


def bank(points=5, shape=SHAPE, classes=CLASSES, vertices=3, seed=0, **changes):
    """Points between linear networks, without a bias: logits = flatten(images) @ w + shift, `shift` being a point's own."""
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
    """What a point of it gives, in numpy."""
    w = np.tensordot(bank.coefficients[point], bank.vertices["w"].astype(np.float64), 1)
    return images.reshape(len(images), -1) @ w + bank.statistics["shift"][point]


def publish(store, name, seeds=(0, 1, 2), *, temperature=1.0, shape=SHAPE, activate=True, bank=None):
    """An ensemble of linear members, and perhaps a bank."""
    with store.staging(name) as staged:
        (staged / "members").mkdir()
        members = []
        for index, seed in enumerate(seeds):
            file = f"members/{index:03d}.onnx"
            onnx.save(linear(seed, shape), staged / file)
            members.append(Member(file=file, origin=Origin(cycle=index + 1), weight=1 / len(seeds)))
        draft = Draft(
            method="fge",
            input=InputSpec(shape=shape),
            classes=["cat", "dog", "bird"],
            members=members,
            temperature=temperature,
            geometry=bank and Geometry(shape="simplex", vertices=["vertices/000.safetensors"], components=[[0]]),
            bank=bank and manifest.Bank(points=len(bank), accuracy_mean=1, accuracy_min=1),
        )
        if bank:
            bank.save(staged / "bank")
            (staged / "vertices").mkdir()
            save_file(bank.vertices, staged / "vertices/000.safetensors")
        return store.publish(name, Path(staged), draft, activate=activate)
