import numpy as np
import pytest

from models_store import runtime
from models_store.errors import MemberError, ProviderError
from models_store.runtime import EnsembleSession, MemberSession, in_batches
from models_store.uncertainty import combine, softmax
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
