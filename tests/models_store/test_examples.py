import shutil

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from models_store import examples
from models_store.decisions.calibrating import Labelled, calibrate
from models_store.errors import CorruptionError, MemberError
from models_store.examples import TOLERANCE, Examples
from models_store.manifest import EXAMPLES_FILE, Draft, InputSpec
from models_store.store import Store
from tests.onnx_members import SHAPE, bank, linear, linear_logits, of_features, of_tokens, point_logits, publish


def test_the_answers_stored_are_those_of_the_members_and_of_some_networks_of_the_bank(store):
    networks = bank(points=30)
    version = publish(store, "e", (0, 1), bank=networks)
    found = examples.load(version.folder, version.manifest)
    assert found.inputs.shape == (5, *SHAPE)
    for seed in (0, 1):
        np.testing.assert_allclose(found.members[seed], linear_logits(linear(seed), found.inputs), atol=1e-5)
    assert len(found.points) == examples.POINTS
    assert {0, 29} <= found.points.keys()
    for number, logits in found.points.items():
        np.testing.assert_allclose(logits, point_logits(networks, number, found.inputs), atol=1e-5)
        found.check("e@1", number, logits, of_bank=True)
        with pytest.raises(MemberError, match=f"e@1 does not pass its self-test: network {number}"):
            found.check("e@1", number, logits[::-1], of_bank=True)


@pytest.mark.parametrize(("spec", "member"), [
    (InputSpec(kind="features", shape=(5,), missing="mean"), of_features),
    (InputSpec(kind="tokens", shape=(9,), vocabulary=20, open_length=True), of_tokens),
])  # fmt: skip
def test_every_kind_of_input_has_examples(store, spec, member):
    version = publish(store, "e", (0,), member=member, spec=spec)
    found = examples.load(version.folder, version.manifest)
    session = onnxruntime.InferenceSession(str(version.folder / "members/000.onnx"), providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(None, {"inputs": found.inputs})[0])
    np.testing.assert_allclose(found.members[0], logits, atol=1e-6)
    found.check("e@1", 0, logits)


LOGITS = np.zeros((1, 2, 3), np.float32)


@given(st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6))
def test_a_difference_is_an_error_exactly_if_a_probability_differs_by_more_than_the_tolerance(values):
    logits = np.array(values, np.float32).reshape(2, 3)
    shares = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float64)
    apart = np.abs(shares / shares.sum(1, keepdims=True) - 1 / 3).max()
    examined = Examples(np.zeros((2, *SHAPE), np.float32), LOGITS, {})
    if apart > TOLERANCE + 1e-6:
        with pytest.raises(MemberError):
            examined.check("e@1", 0, logits)
    elif apart < TOLERANCE - 1e-6:
        examined.check("e@1", 0, logits)


@pytest.mark.parametrize(
    "logits",
    [np.full((2, 3), np.nan, np.float32), np.full((2, 3), np.inf, np.float32), np.zeros((1, 3)), np.zeros((2, 2))],
)
def test_nan_and_other_shapes_are_differences(logits):
    with pytest.raises(MemberError, match="self-test"):
        Examples(np.zeros((2, *SHAPE), np.float32), LOGITS, {}).check("e@1", 0, logits)


def broken(seed, shape):
    model = linear(seed, shape)
    model.graph.initializer[0].raw_data = np.full(
        len(model.graph.initializer[0].raw_data) // 4, np.nan, np.float32
    ).tobytes()
    return model


def test_a_member_that_answers_with_nan_is_not_published(store):
    with pytest.raises(MemberError, match=r"members/000.onnx answers noise with NaN"):
        publish(store, "e", (0,), member=broken)
    assert store.versions("e") == []


def test_a_file_that_does_not_fit_the_version_is_damage(store):
    version = publish(store, "e", (0, 1))
    file = version.folder / EXAMPLES_FILE
    tensors = load_file(file)
    save_file({**tensors, "members": tensors["members"][:1]}, file)
    with pytest.raises(CorruptionError, match="every member"):
        examples.load(version.folder, version.manifest)
    file.write_bytes(b"x")
    with pytest.raises(CorruptionError, match="does not hold examples"):
        examples.load(version.folder, version.manifest)


def test_a_version_without_examples_is_read_as_before(store):
    version = publish(store, "e", (0,))
    with store.staging("old") as staged:
        shutil.copytree(version.folder / "members", staged / "members")
        record = version.manifest
        draft = Draft(method="import", input=record.input, classes=record.classes, members=record.members)
        old = store.publish("old", staged, draft, self_test=False)
    assert EXAMPLES_FILE not in old.manifest.files
    assert examples.load(old.folder, old.manifest) is None


def test_a_calibrated_copy_and_a_backup_have_the_examples(store, tmp_path):
    version = publish(store, "e", (0, 1))
    images = np.random.default_rng(0).random((80, *SHAPE), np.float32)
    labels = (linear_logits(linear(0), images) + linear_logits(linear(1), images)).argmax(1)
    copy = calibrate(store, version, Labelled(images, labels, "noise", None))
    for one in (copy, Store(tmp_path / "other").adopt(copy)):
        np.testing.assert_array_equal(
            examples.load(one.folder, one.manifest).members, examples.load(version.folder, version.manifest).members
        )
