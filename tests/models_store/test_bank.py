import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models_store.bank import Bank, check_bank
from models_store.errors import CorruptionError, MemberError
from models_store.graphs.runtime import MemberSession
from models_store.manifest import ONNX_OPSET, InputSpec


def template(external=("w", "shift")):
    """logits = flatten(images) @ w + shift, for images (1, 2, 2) and 3 classes; weights are supplied from memory."""
    shapes = {"w": (4, 3), "shift": (3,)}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["scores"]),
            helper.make_node("Add", ["scores", "shift"], ["logits"]),
        ],
        "template",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
    )
    for name, shape in shapes.items():
        if name in external:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="given-from-memory")
        else:
            tensor = onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name)
        graph.initializer.append(tensor)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=10
    ).SerializeToString()


def bank(points=5, **changes):
    rng = np.random.default_rng(0)
    fields = {
        "template": template(),
        "vertices": {"w": rng.normal(size=(3, 4, 3)).astype(np.float32)},
        "statistics": {"shift": rng.normal(size=(points, 3)).astype(np.float32)},
        "coefficients": rng.dirichlet(np.ones(3), points),
        "temperature": np.ones(points),
        "accuracy": np.ones(points),
        "nll": np.ones(points),
    }
    return Bank(**{**fields, **changes})


def test_a_point_answers_as_its_weights_say(tmp_path):
    made = bank()
    made.save(tmp_path / "bank")
    found = Bank.load(tmp_path / "bank")
    check_bank(tmp_path / "bank", InputSpec(shape=(1, 2, 2)), 3, 5)
    images = np.random.default_rng(1).random((6, 1, 2, 2)).astype(np.float32)
    for point in range(5):
        w = np.tensordot(made.coefficients[point], made.vertices["w"].astype(np.float64), 1)
        expected = images.reshape(6, 4) @ w + made.statistics["shift"][point]
        assert MemberSession(found.template, weights=found.weights(point)).logits(images) == pytest.approx(
            expected, abs=1e-5
        )


def test_a_vertex_is_itself_bit_for_bit():
    made = bank(points=3, coefficients=np.eye(3), statistics={"shift": np.zeros((3, 3), np.float32)})
    assert all(np.array_equal(made.weights(v)["w"], made.vertices["w"][v]) for v in range(3))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"coefficients": np.full((5, 3), 0.5)}, "sum to 1"),
        ({"temperature": np.zeros(5)}, "temperature is not"),
        ({"temperature": np.full(5, 1e-320)}, "temperature is not"),
        ({"temperature": np.full(5, 1e9)}, "temperature is not"),
        ({"nll": np.full(5, np.nan)}, "nll is not a number"),
        ({"vertices": {"w": np.zeros((2, 4, 3), np.float32)}}, "w is not 3"),
        ({"statistics": {"shift": np.full((5, 3), np.inf, np.float32)}}, "shift is not 5 finite"),
        ({"statistics": {"w": np.zeros((5, 4, 3), np.float32)}}, "in both files"),
    ],
)
def test_a_broken_bank_is_refused(changes, told, tmp_path):
    bank(**changes).save(tmp_path / "bank")
    with pytest.raises(CorruptionError, match=told):
        Bank.load(tmp_path / "bank")


def test_a_template_and_weights_that_disagree_are_refused(tmp_path):
    bank(template=template(external=("w",))).save(tmp_path / "bank")
    with pytest.raises(MemberError, match="disagree about the initializer 'shift'"):
        check_bank(tmp_path / "bank", InputSpec(shape=(1, 2, 2)), 3, 5)
    with pytest.raises(MemberError, match="holds 5 points; its manifest says 6"):
        check_bank(tmp_path / "bank", InputSpec(shape=(1, 2, 2)), 3, 6)


def test_a_damaged_bank_is_told(tmp_path):
    bank().save(tmp_path / "bank")
    (tmp_path / "bank/points.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptionError, match="is not a bank"):
        Bank.load(tmp_path / "bank")
