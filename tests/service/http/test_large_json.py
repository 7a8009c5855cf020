import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_store.manifest import InputSpec, TableField
from service.http.errors import BadRequestError, TooLargeError
from service.http.large_json import cut

SHAPES = [(1, 2, 3), (3, 1, 2)]
SPECS = [InputSpec(shape=shape) for shape in SHAPES]


def batches(rows, shape):
    channels, height, width = shape
    return [[[[0.25] * width for _ in range(height)] for _ in range(channels)] for _ in range(rows)]


@given(
    rows=st.integers(0, 5),
    shape=st.sampled_from(SHAPES),
    options=st.dictionaries(st.sampled_from(["ensemble", "mode"]), st.text(max_size=8)),
    first=st.booleans(),
    indent=st.booleans(),
)
def test_what_is_cut_out_and_what_is_left_are_the_body(rows, shape, options, first, indent):
    inputs = batches(rows, shape)
    fields = {"inputs": inputs, **options} if first else {**options, "inputs": inputs}
    body = orjson.dumps(fields, option=orjson.OPT_INDENT_2 if indent else None)
    rest, found = cut(body, SPECS, 5)
    assert found is not None
    assert orjson.loads(rest) == {**fields, "inputs": []}
    assert [orjson.loads(row.text) for row in found] == inputs
    assert {row.lists for row in found} <= {1 + shape[0] + shape[0] * shape[1]}


def test_a_body_without_inputs_stays_as_it_is():
    body = b'{"images": ["aaaa", "bbbb"]}'
    assert cut(body, SPECS, 5) == (body, None)


def test_a_text_that_looks_like_the_field_is_not_taken_for_it():
    body = rb'{"ensemble": "\"inputs\": [", "inputs": [[1]]}'
    rest, rows = cut(body, SPECS, 5)
    assert orjson.loads(rest) == {"ensemble": '"inputs": [', "inputs": []}
    assert [row.text for row in rows or ()] == [b"[1]"]


def test_too_many_images_are_refused_before_one_is_parsed():
    with pytest.raises(TooLargeError, match="6 images"):
        cut(orjson.dumps({"inputs": batches(6, SHAPES[0])}), SPECS, 5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"inputs": [' + b",".join([b"[]"] * 200) + b"]}", "more lists"),
        (b'{"inputs": [' + b"]" * 10_000, "more lists"),
        (b'{"inputs": [], "a": [' + b'"a",' * 100 + b'""]}', "more strings"),
        (b'{"inputs": [], "a": [' + b"1," * 100 + b"1]}", "more than 5 images"),
        (b'{"inputs": [], "a": ' + b"{" * 40 + b"}" * 41, "more than 5 images"),
        (b'{"images": [' + b"1," * 100 + b"1]}", "more than 5 images"),
        (b'{"inputs": [[[[1]]]', "not closed"),
        (b'{"inputs": [[1] [2]]}', "not a list of images"),
        (b'{"inputs": [[1],, [2]]}', "not a list of images"),
        (b'{"inputs": [[1], 2]}', "not a list of images"),
        (b'{"inputs": [0.5, [2]]}', "not a list of images"),
        (b'{"inputs": [["a"]]}', "not a number"),
        (b'{"inputs": [[true]]}', "not a number"),
    ],
)
def test_a_body_that_cannot_be_a_request_is_refused_unparsed(body, message):
    with pytest.raises(BadRequestError, match=message):
        cut(body, SPECS, 5)


def test_rows_with_named_fields_are_bounded_and_left_whole():
    fields = [TableField(name="size"), TableField(name="kind", categories=["a", "b"])]
    specs = [InputSpec(kind="features", shape=(3,), fields=fields)]
    body = orjson.dumps({"inputs": [{"size": 1.5, "kind": "a"}] * 5})
    assert cut(body, specs, 5) == (body, None)
    with pytest.raises(TooLargeError, match="More than 5 rows"):
        cut(orjson.dumps({"inputs": [{"size": 1.5}] * 50}), specs, 5)
    with pytest.raises(BadRequestError, match="more fields than 5 rows"):
        cut(orjson.dumps({"inputs": [{f"f{i}": 0 for i in range(500)}]}), specs, 5)


def test_marks_in_the_texts_of_categories_are_no_lists_or_fields():
    fields = [TableField(name="age", categories=["[0-9, young]", "{10}"]), TableField(name="size")]
    specs = [InputSpec(kind="features", shape=(3,), fields=fields)]
    body = orjson.dumps({"inputs": [{"age": "[0-9, young]", "size": 1}, {"age": "{10}", "size": 2}] * 50})
    assert cut(body, specs, 100) == (body, None)
    with pytest.raises(BadRequestError, match="more lists than the named fields"):
        cut(orjson.dumps({"inputs": [{"age": [[0]] * 200}]}), specs, 100)
