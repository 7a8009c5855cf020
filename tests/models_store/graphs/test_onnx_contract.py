import onnx
import pytest
from onnx import helper

from models_store.errors import MemberError
from models_store.graphs.onnx_contract import check_member
from models_store.manifest import InputSpec
from tests.onnx_members import CLASSES, SHAPE, linear


def saved(tmp_path, model):
    file = tmp_path / "member.onnx"
    onnx.save(model, file)
    return file


def test_a_member_by_the_book_passes(tmp_path):
    check_member(saved(tmp_path, linear(0)), InputSpec(shape=SHAPE), CLASSES)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"opset": 17}, "opset 17"),
        ({"input_name": "x"}, "named 'images'"),
        ({"output_name": "y"}, "named 'logits'"),
        ({"batch": 1}, "fixed batch size 1"),
        ({"shape": (3, 4, 4)}, "must be"),
        ({"classes": 5}, "must be"),
    ],
)
def test_every_broken_rule_is_named(tmp_path, changes, told):
    with pytest.raises(MemberError, match=told):
        check_member(saved(tmp_path, linear(0, **changes)), InputSpec(shape=SHAPE), CLASSES)


def test_what_is_no_onnx_is_refused(tmp_path):
    file = tmp_path / "member.onnx"
    file.write_bytes(b"\xff\xfe not a model")
    with pytest.raises(MemberError, match="cannot be read"):
        check_member(file, InputSpec(shape=SHAPE), CLASSES)


def test_external_data_is_refused(tmp_path):
    model = linear(0)
    onnx.save(model, tmp_path / "member.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(MemberError, match="another file"):
        check_member(tmp_path / "member.onnx", InputSpec(shape=SHAPE), CLASSES)


def test_operators_of_other_domains_are_refused(tmp_path):
    model = linear(0)
    model.graph.node.append(helper.make_node("FusedGelu", ["flat"], ["unused"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(MemberError, match=r"com\.microsoft"):
        check_member(saved(tmp_path, model), InputSpec(shape=SHAPE), CLASSES)
