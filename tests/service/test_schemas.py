import numpy as np
from pydantic import TypeAdapter

from models_store.uncertainty import combine
from service.schemas import EnsembleInfo, PredictResponse, Uncertainty, describe, respond
from tests.onnx_members import publish

probs = np.random.default_rng(0).dirichlet(np.ones(3), size=(3, 4))
prediction = combine(probs, np.full(3, 1 / 3))


def test_each_row_carries_its_own_numbers(store):
    manifest = publish(store, "a").manifest
    answer = respond(manifest, "id", "average", prediction, probs)
    assert len(answer["predictions"]) == 4
    for i, row in enumerate(answer["predictions"]):
        assert row["probs"] == prediction.mean_probs[i].tolist()
        assert row["label"] == prediction.label[i]
        assert row["confidence"] == prediction.confidence[i]
        assert row["class_name"] == manifest.classes[row["label"]]
        assert row["uncertainty"] == {measure: getattr(prediction, measure)[i] for measure in row["uncertainty"]}
        assert row["members"] == probs[:, i].tolist()


def test_the_answer_is_what_the_schema_says(store):
    manifest = publish(store, "a").manifest
    for member_probs in (None, probs):
        answer = respond(manifest, "id", "average", prediction, member_probs)
        assert TypeAdapter(PredictResponse).validate_python(answer, strict=True, extra="forbid") == answer


def test_members_are_absent_unless_asked(store):
    answer = respond(publish(store, "a").manifest, "id", "average", prediction, None)
    assert "members" not in answer["predictions"][0]


def test_every_uncertainty_field_is_a_measure():
    assert set(Uncertainty.__annotations__) <= set(vars(prediction))


def test_clients_see_a_whitelist_only(store):
    shown = describe(publish(store, "a").manifest, ["CPUExecutionProvider"], is_default=True).model_dump()
    assert set(shown) == set(EnsembleInfo.model_fields)
    assert not {"provenance", "files", "network", "created"} & set(shown)
