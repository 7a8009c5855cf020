import numpy as np
import onnx
import pytest

from models_store.errors import MemberError
from models_store.importing import ImportOptions, import_members
from models_store.runtime import EnsembleSession
from models_store.uncertainty import softmax
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
    version = import_members(
        store, "zoo", saved(tmp_path, linear(0, softmax=True)), ImportOptions(output_is_probs=True)
    )
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
        ([linear(0), linear(1, shape=(1, 5, 5))], ImportOptions(), "same images"),
        ([linear(0), linear(1, classes=4)], ImportOptions(), "same classes"),
        ([linear(0, batch=1)], ImportOptions(), "fixed batch size 1"),
        ([linear(0)], ImportOptions(classes=["a", "b"]), "2 class names"),
        ([linear(0)], ImportOptions(mean=[0.1, 0.2]), "one a channel"),
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
