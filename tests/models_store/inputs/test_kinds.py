import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_store.inputs import kinds
from models_store.manifest import InputSpec

IMAGE = InputSpec(shape=(1, 2, 2))
ROW = InputSpec(kind="features", shape=(3,), low=-1, high=5)
GAPS = InputSpec(kind="features", shape=(3,), missing="mean")
TEXT = InputSpec(kind="tokens", shape=(6,), vocabulary=10, open_length=True)
CLOSED = InputSpec(kind="tokens", shape=(6,), vocabulary=10)
ALL = [IMAGE, ROW, GAPS, TEXT, CLOSED, InputSpec(kind="features", shape=(2, 3, 4))]


@pytest.mark.parametrize("spec", ALL)
def test_rows_for_checks_are_allowed_inputs_of_their_type(spec):
    for rows in (
        kinds.blank(spec),
        kinds.noise(spec, 7),
        kinds.probes(spec),
        kinds.probes(spec, kinds.noise(spec, 3, 5)),
    ):
        assert kinds.fits(spec, rows.shape)
        assert kinds.fault(spec, rows) is None
        assert rows.dtype == kinds.dtype(spec)
        assert len({row.tobytes() for row in rows}) == len(rows) or spec.kind == "tokens"


def test_checks_ask_about_texts_of_several_lengths_and_alone_without_padding():
    probes = kinds.probes(TEXT)
    lengths = {kinds.alone(TEXT, row[None]).shape[1] for row in probes}
    assert {1, 6} <= lengths
    assert kinds.alone(CLOSED, probes[-1:]).shape[1] == 6


@pytest.mark.parametrize(
    ("spec", "inputs", "told"),
    [
        (IMAGE, np.full((1, 1, 2, 2), 1.5), "pixels must lie in"),
        (IMAGE, np.full((1, 1, 2, 2), np.nan), "pixels must lie in"),
        (ROW, np.array([[0, 1, np.nan]]), r"NaN \(row 0, feature 2\)"),
        (ROW, np.array([[0, 1, 2], [0, np.inf, 0]]), r"infinite \(row 1, feature 1\)"),
        (ROW, np.array([[0, 1, 6.0]]), "takes features from -1 to 5"),
        (GAPS, np.array([[0, np.inf, np.nan]]), "infinite"),
        (GAPS, np.array([[0, 1, 1e39]]), "float32 cannot hold"),
        (ROW, np.array([["a", "b", "c"]]), "send numbers"),
        (TEXT, np.array([[1, 10]]), "they go from 1 to 9"),
        (TEXT, np.array([[-1, 2]]), "they go from 1 to 9"),
        (TEXT, np.array([[1, 2], [0, 0]]), r"without tokens \(row 1\)"),
        (TEXT, np.array([[1, 0, 2]]), r"before a token \(row 0\)"),
        (TEXT, np.array([[1.0, 2.0]]), "token ids are integers"),
    ],
)
def test_values_that_are_not_allowed_are_named(spec, inputs, told):
    import re

    assert re.search(told, kinds.fault(spec, inputs))


def test_missing_numbers_are_allowed_where_the_mean_replaces_them():
    assert kinds.fault(GAPS, np.array([[0, np.nan, 1]])) is None
    assert kinds.fault(GAPS, np.full((1, 3), np.nan)) is None


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_texts_keep_their_tokens_whatever_they_are_batched_with(texts):
    for spec in (TEXT, CLOSED):
        rows = kinds.arranged(spec, kinds.from_texts(spec, texts))
        assert rows.shape[1] == (max(map(len, texts)) if spec.open_length else 6)
        together = kinds.joined([rows, kinds.arranged(spec, kinds.from_texts(spec, [[1] * 6]))])
        assert together.shape == (len(texts) + 1, 6)
        for text, row in zip(texts, together, strict=False):
            assert row[: len(text)].tolist() == text
            assert not row[len(text) :].any()
            assert kinds.identity(row) == kinds.identity(np.array(text))
    lengths, distinct = kinds.statistics(kinds.from_texts(TEXT, texts))
    assert lengths.tolist() == [len(text) for text in texts]
    assert distinct == pytest.approx([len(set(text)) / len(text) for text in texts])


def test_the_statistics_of_numbers_are_their_mean_and_spread():
    rows = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    mean, std = kinds.statistics(rows)
    assert mean == pytest.approx(rows.reshape(4, -1).mean(axis=1), abs=1e-6)
    assert std == pytest.approx(rows.reshape(4, -1).std(axis=1), abs=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "tokens", "shape": (3,)},
        {"kind": "tokens", "shape": (3, 4), "vocabulary": 5},
        {"kind": "image", "shape": (3, 4)},
        {"kind": "image", "shape": (1, 2, 2), "low": 0.0},
        {"kind": "features", "shape": (2,), "low": 1.0, "high": 1.0},
        {"kind": "features", "shape": (0,)},
        {"kind": "features", "shape": (2,), "vocabulary": 5},
        {"kind": "features", "shape": (2,), "fields": [{"name": "a"}]},
        {"kind": "features", "shape": (2,), "fields": [{"name": "a"}, {"name": "a"}]},
    ],
)
def test_an_input_that_cannot_be_is_no_spec(fields):
    with pytest.raises(ValueError, match=r"input shape|vocabulary|features|range|same name"):
        InputSpec.model_validate(fields)


@pytest.mark.parametrize("spec", ALL)
def test_only_the_fields_of_its_kind_are_written_and_read_back(spec):
    record = spec.model_dump(mode="json")
    assert ("kind" in record) == (spec.kind != "image")
    assert InputSpec.model_validate_json(spec.model_dump_json()) == spec
    if spec.kind == "image":
        assert record == {"shape": [1, 2, 2], "resize": "refuse"}
