import numpy as np
import pytest

from models_store.errors import FieldError
from models_store.inputs import fields
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
