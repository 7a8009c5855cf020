import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from models_store.manifest import Manifest
from models_store.uncertainty import combine
from service.http.schemas import EnsembleInfo, PredictResponse, Uncertainty, describe, padded, respond
from service.inference.pieces import Answer
from service.inference.policy import Policy
from tests.onnx_members import publish

probs = np.random.default_rng(0).dirichlet(np.ones(3), size=(3, 4))
prediction = combine(probs, np.full(3, 1 / 3))
ANSWER = Answer(probs, prediction, 0.1, 0.2)
ALONE = Answer(probs[:1], combine(probs[:1], np.ones(1)), 0.1, 0.2)


def test_each_row_carries_its_own_numbers(store):
    manifest = publish(store, "a").manifest
    answer = respond(manifest, "id", "average", ANSWER, Policy(), members=True)
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
    for members in (False, True):
        answer = respond(manifest, "id", "average", ANSWER, Policy(), members=members)
        assert TypeAdapter(PredictResponse).validate_python(answer, strict=True, extra="forbid") == answer


def test_members_are_absent_unless_asked(store):
    answer = respond(publish(store, "a").manifest, "id", "average", ANSWER, Policy(), members=False)
    assert "members" not in answer["predictions"][0]


@pytest.mark.parametrize("mode", ["random", "keyed"])
def test_a_network_by_itself_tells_neither_uncertainty_nor_how_many_there_are_nor_which_it_is(store, mode):
    answer = respond(
        publish(store, "a").manifest, "id", mode, ALONE, Policy(modes=(mode,)), members=False, points=[3] * 4
    )
    assert TypeAdapter(PredictResponse).validate_python(answer, strict=True, extra="forbid") == answer
    assert set(answer) == {"ensemble", "version", "mode", "request_id", "predictions"}
    for i, row in enumerate(answer["predictions"]):
        assert set(row) == {"label", "class_name", "confidence", "probs"}
        assert row["probs"] == [round(p, 2) for p in probs[0, i].tolist()]
        assert row["confidence"] == max(row["probs"])


def test_the_operator_may_show_labels_only_or_all_digits_or_the_point(store):
    manifest = publish(store, "a").manifest
    for shown, fields in (("none", {"label", "class_name"}), (1, {"label", "class_name", "confidence", "probs"})):
        for mode, answer in (("random", ALONE), ("average", ANSWER)):
            policy = Policy(modes=(mode,), probabilities=shown, uncertainty=False)
            rows = respond(manifest, "id", mode, answer, policy, members=False)["predictions"]
            assert all(set(row) == fields for row in rows)
    policy = Policy(modes=("random",), probabilities="exact", point=True)
    rows = respond(manifest, "id", "random", ALONE, policy, members=False, points=[5, 0, 1, 5])["predictions"]
    assert [row["point"] for row in rows] == [5, 0, 1, 5]
    assert rows[2]["probs"] == probs[0, 2].tolist()


def test_every_uncertainty_field_is_a_measure():
    assert set(Uncertainty.__annotations__) <= set(vars(prediction))


def test_clients_see_a_whitelist_only(store):
    manifest = publish(store, "a").manifest
    shown = describe(manifest, ["CPUExecutionProvider"], Policy(), None, is_default=True).model_dump()
    assert set(shown) == set(EnsembleInfo.model_fields)
    assert not {"provenance", "files", "network", "created"} & set(shown)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    classes=st.lists(NAMES, min_size=2, max_size=5, unique=True),
    digits=st.sampled_from(["none", 1, 2, 3, 4, 5, 6, "exact"]),
    shows_point=st.booleans(),
    numbers=st.lists(st.floats(1e-300, 1), min_size=10, max_size=10),
    point=st.integers(0, 10**6),
)
def test_answers_to_equally_many_rows_are_equally_long_whatever_is_in_them(
    classes, digits, shows_point, numbers, point
):
    manifest = Manifest.model_construct(name="a" * 64, version=10**6, classes=classes)
    policy = Policy(modes=("random",), probabilities=digits, point=shows_point)
    lengths = set()
    for first in (0, 1):
        raw = np.array(numbers[first * 5 :][: len(classes)])
        found = (raw / raw.sum())[None, None]
        reply = respond(
            manifest, "0" * 16, "random", Answer(found, combine(found, np.ones(1)), 0.1, 0.2), policy, members=False, points=[point * first],
        )  # fmt: skip
        whole = orjson.dumps(reply)
        filled = padded(whole, manifest, policy, "random", 1)
        assert orjson.loads(filled) == orjson.loads(whole)
        lengths.add(len(filled))
    assert len(lengths) == 1


def test_an_answer_longer_than_expected_is_still_filled_up_and_logged(store, caplog):
    manifest = publish(store, "a").manifest
    assert len(padded(b"x" * 5000, manifest, Policy(modes=("random",)), "random", 1)) == 5120
    assert "its length may reveal" in caplog.text
