import numpy as np
import pytest

from models_store.errors import FieldError
from models_store.inputs import fields, kinds
from models_store.manifest import InputSpec, TableField

FIELDS = [TableField(name="age"), TableField(name="colour", categories=["", "blue", "red"]), TableField(name="size")]
SPEC = InputSpec(kind="features", shape=(5,), low=-10, high=200, fields=FIELDS)


def test_numbers_stay_and_categories_become_one_feature_each():
    rows = fields.encode([{"age": 30, "colour": "red", "size": 1.5}, {"size": 2, "age": -3, "colour": None}], SPEC)
    assert rows.tolist() == [[30, 0, 0, 1, 1.5], [-3, 1, 0, 0, 2]]
    assert rows.dtype == np.float32


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"age": 1, "colour": "red"}, "row 1, field 'size', is missing"),
        ({"age": 1, "colour": "green", "size": 1}, "row 1, field 'colour', has the unknown category 'green'.*'blue', 'red'"),
        ({"age": 1, "colour": 3, "size": 1}, "row 1, field 'colour', is 3; it must be a text"),
        ({"age": "old", "colour": "red", "size": 1}, "row 1, field 'age', is 'old'; it must be a number"),
        ({"age": True, "colour": "red", "size": 1}, "row 1, field 'age', is True"),
        ({"age": 201, "colour": "red", "size": 1}, "row 1, field 'age', is 201; it must be a number from -10 to 200"),
        ({"age": 10**400, "colour": "red", "size": 1}, "row 1, field 'age'"),
        ({"age": float("nan"), "colour": "red", "size": 1}, "row 1, field 'age'"),
        ({"age": 1, "colour": "red", "size": 1, "extra": 0}, "row 1 has the unknown field 'extra'.*'age', 'colour', 'size'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_named(row, told):
    with pytest.raises(FieldError, match=told):
        fields.encode([{"age": 1, "colour": "blue", "size": 2}, row], SPEC)


def test_a_missing_number_is_nan_where_it_may_be_missing():
    spec = SPEC.model_copy(update={"missing": "mean"})
    found = fields.encode([{"age": None, "colour": "red"}], spec)
    assert np.isnan(found[0, [0, 4]]).all()


def test_a_truth_value_is_a_category():
    spec = InputSpec(kind="features", shape=(2,), fields=[TableField(name="open", categories=["false", "true"])])
    assert fields.encode([{"open": True}, {"open": "false"}], spec).tolist() == [[0, 1], [1, 0]]


TENSORS = [
    TableField(name="photo", shape=(2, 3), low=0, high=1),
    TableField(name="age"),
    TableField(name="colour", categories=["blue", "red"]),
]
MIXED = InputSpec(kind="features", shape=(9,), fields=TENSORS)
PHOTOS = np.arange(12).reshape(2, 2, 3) / 12


def test_tensors_become_their_numbers_in_order_row_by_row_and_by_column():
    rows = [{"photo": PHOTOS[i].tolist(), "age": 30 + i, "colour": ["red", "blue"][i]} for i in range(2)]
    found = fields.encode(rows, MIXED)
    expected = [[*PHOTOS[0].ravel(), 30, 0, 1], [*PHOTOS[1].ravel(), 31, 1, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    columns = {"colour": ["red", "blue"], "photo": PHOTOS, "age": [30, 31]}
    np.testing.assert_array_equal(fields.from_columns(columns, MIXED), found)
    columns = {"colour": np.array(["red", "blue"]), "photo": PHOTOS.tolist(), "age": np.array([[30], [31]], np.int32)}
    np.testing.assert_array_equal(fields.from_columns(columns, MIXED), found)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"photo": PHOTOS[:1]}, "different numbers of rows: photo 1, age 2, colour 2"),
        ({"photo": PHOTOS.reshape(2, 6)}, r"field 'photo', has rows of the shape \(6,\); it must hold numbers of the shape \(2, 3\)"),
        ({"photo": PHOTOS * 2}, "field 'photo', has the value .*; it must hold numbers from 0 to 1"),
        ({"photo": [[[0.0] * 3] * 2, [[0.0] * 3]]}, "field 'photo', has"),
        ({"age": ["old", "young"]}, "field 'age', has values that are not numbers; it must be a number"),
        ({"age": [1, None]}, "field 'age', has"),
        ({"age": [True, False]}, "field 'age', has values that are not numbers"),
        ({"colour": ["red", "green"]}, "field 'colour', row 1, has the unknown category 'green'"),
        ({"age": 3}, "the field 'age' is not a list"),
        ({"colour": "rb"}, "the field 'colour' is not a list"),
        ({"age": [1, True]}, "field 'age', has values that are not numbers"),
        ({"photo": [[[True] * 3] * 2] * 2}, "field 'photo', has values that are not numbers"),
        ({"photo": [[["0.5"] * 3] * 2] * 2}, "field 'photo', has values that are not numbers"),
        ({"photo": [None, None]}, "field 'photo', has values that are not numbers"),
        ({"size": [1, 2]}, "the field 'size' is unknown"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_column_is_named(change, told):
    with pytest.raises(FieldError, match=told):
        fields.from_columns({"photo": PHOTOS, "age": [1, 2], "colour": ["red", "red"], **change}, MIXED)
    if "photo" in change and len(change["photo"]) == 2:
        with pytest.raises(FieldError, match=r"row [01], field 'photo'"):
            fields.encode([{"photo": one, "age": 1, "colour": "red"} for one in change["photo"]], MIXED)


def test_a_missing_column_is_named():
    with pytest.raises(FieldError, match="the field 'age' is missing"):
        fields.from_columns({"photo": PHOTOS, "colour": ["red", "red"]}, MIXED)


def test_missing_numbers_of_a_column_are_nan_where_they_may_be():
    spec = MIXED.model_copy(update={"missing": "mean"})
    found = fields.from_columns({"photo": PHOTOS, "age": [None, 2], "colour": ["red", "red"]}, spec)
    assert np.isnan(found[:, 6]).tolist() == [True, False]


def test_the_range_of_a_field_is_checked_in_features_too():
    good = np.zeros((1, 9), np.float32)
    good[0, 6:] = [500, 0, 1]
    assert kinds.fault(MIXED, good) is None
    good[0, 2] = 1.5
    assert "in the field 'photo', which takes numbers from 0 to 1" in kinds.fault(MIXED, good)
    for rows in (kinds.probes(MIXED), kinds.noise(MIXED, 5), kinds.blank(MIXED)):
        assert kinds.fault(MIXED, rows) is None


def test_texts_and_truth_values_are_no_numbers_where_numbers_may_be_missing_either():
    spec = MIXED.model_copy(update={"missing": "mean"})
    for ages in (["1.5", None], [True, None]):
        with pytest.raises(FieldError, match="values that are not numbers"):
            fields.from_columns({"photo": PHOTOS, "age": ages, "colour": ["red", "red"]}, spec)
    with pytest.raises(FieldError, match="row 0, field 'photo', is missing"):
        fields.encode([{"age": 1, "colour": "red"}], spec)
