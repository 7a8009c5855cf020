import json
import tracemalloc

import pytest
from pydantic import ValidationError

from models_store.errors import ManifestError
from models_store.manifest import Draft, InputSpec, Manifest, Member, Origin
from tests.onnx_members import publish


def draft(**changes):
    fields = {
        "method": "fge",
        "input": InputSpec(shape=(1, 4, 4)),
        "classes": ["a", "b"],
        "members": [Member(file="members/000.onnx", origin=Origin(), weight=1.0)],
    }
    return Draft(**{**fields, **changes})


def test_weights_must_sum_to_one():
    member = Member(file="members/000.onnx", origin=Origin(), weight=0.5)
    with pytest.raises(ValidationError, match="sum to 1"):
        draft(members=[member])


def test_two_members_cannot_share_a_file():
    member = Member(file="members/000.onnx", origin=Origin(), weight=0.5)
    with pytest.raises(ValidationError, match="share one file"):
        draft(members=[member, member])


def test_class_names_are_distinct():
    with pytest.raises(ValidationError, match="distinct"):
        draft(classes=["a", "a"])


@pytest.mark.parametrize("file", ["../000.onnx", "/etc/passwd", "members/../../x.onnx", "members/000.py"])
def test_a_member_cannot_lie_outside_its_folder(file):
    with pytest.raises(ValidationError):
        Member(file=file, origin=Origin(), weight=1.0)


def test_calibration_is_reserved():
    with pytest.raises(ValidationError):
        draft(calibration={"alpha": 0.1})


def test_dump_and_parse_are_inverse(store):
    manifest = publish(store, "a").manifest
    assert Manifest.parse(manifest.dump(), "here") == manifest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 5}, "schema version 5"),
        ({"surprise": 1}, "surprise"),
        ({"temperature": 0}, "temperature"),
        ({"files": {"../x": "0" * 64}}, "FORMAT.md"),
        ({"members": []}, "members"),
        ({"schema_version": True}, "schema version True"),
        ({"schema_version": 1.0}, "schema version 1.0"),
        ({"schema_version": "1"}, "schema version '1'"),
        ({"version": "1"}, "version"),
        ({"version": True}, "version"),
        ({"version": 1.0}, "version"),
        ({"temperature": "1.0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1e-320}, "temperature"),
        ({"temperature": 1e4}, "temperature"),
        ({"classes": ["x", "y", 3]}, "classes"),
        ({"classes": ["x", "y", "\ud800"]}, "surrogates"),
        ({"input": {"shape": [1, 4, "4"]}}, "shape"),
        ({"digest": "0" * 64}, "digest differs"),
        ({"digest": "A" * 64}, "digest"),
        ({"provenance": {"config": {"a": 1e999}}}, "not a number"),
        ({"members": [{}] * 4097}, "more than 4096"),
        ({"files": {f"f{i}": "0" * 64 for i in range(16385)}}, "more than 16384"),
    ],
)
def test_a_broken_manifest_is_refused_with_the_place(store, change, told):
    record = json.loads(publish(store, "a").manifest.dump()) | change
    with pytest.raises(ManifestError, match=told):
        Manifest.parse(json.dumps(record), "manifest.json")


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_what_is_no_manifest_at_all_is_refused(text):
    with pytest.raises(ManifestError):
        Manifest.parse(text, "manifest.json")


def sealed(record):
    """The text of a changed manifest with a correct digest."""
    return Manifest.model_validate({**record, "digest": None}).sealed().dump()


def test_a_sealed_manifest_is_read_and_any_other_text_of_it_is_not(store):
    text = publish(store, "a").manifest.dump()
    record = json.loads(text)
    changed = {**record, "temperature": 1.5}
    assert Manifest.parse(sealed(changed), "here").temperature == 1.5
    for other in (json.dumps(record), text + " ", text.replace('"temperature": 1.0', '"temperature": 9.0')):
        with pytest.raises(ManifestError, match="digest differs"):
            Manifest.parse(other, "here")
    assert Manifest.parse(text.encode(), "here").sealed().dump() == text


def test_a_text_without_a_digest_is_read(store):
    manifest = publish(store, "a").manifest
    record = {key: value for key, value in json.loads(manifest.dump()).items() if key != "digest"}
    assert Manifest.parse(json.dumps(record), "here") == manifest.model_copy(update={"digest": None})


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}",
        b"\xef\xbb\xbf{}",
        '{"schema_version": 1}'.encode("utf-16"),
        '{"schema_version": 1}'.encode("utf-32"),
        b'{"a": "\xff"}',
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"schema_version": 1, "schema_version": 1}',
        b'{"schema_version": 1, "provenance": {"config": {"a": 1, "a": 2}}}',
        b'{"schema_version": 1, "temperature": NaN}',
        b'{"schema_version": 1, "temperature": Infinity}',
        rb'{"schema_version": 1, "method": "\ud800"}',
        rb'{"schema_version": 1, "\udfff": 1}',
        b'{"schema_version": 1, "' + b"x" * 10_000 + b'\\n": 1}',
    ],
    ids=range(16),
)
def test_what_is_not_strict_json_is_refused_on_one_short_line(content):
    with pytest.raises(ManifestError) as refused:
        Manifest.parse(content, "manifest.json")
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b'{"schema_version": 1, "members": [' + b"{}," * 1_000_000 + b"{}]}",
        b'{"schema_version": 1, "classes": [' + b"[]," * 1_000_000 + b"[]]}",
        b'{"schema_version": 1, ' + b'"a":1,' * 1_000_000 + b'"b": 1}',
        b'{"schema_version": 1, "method": "' + b"x" * 2**25 + b'"}',
    ],
    ids=["members", "lists", "fields", "bytes"],
)
def test_a_huge_manifest_is_refused_before_it_is_built(content):
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError, match=r"more than 262144 values|at most 16777216"):
            Manifest.parse(content, "manifest.json")
        assert tracemalloc.get_traced_memory()[1] < 3 * len(content)
    finally:
        tracemalloc.stop()


def test_a_class_name_that_cannot_be_written_is_refused_when_it_is_given():
    with pytest.raises(ValidationError, match="UTF-8"):
        draft(classes=["a", "\ud800"])
    assert draft(classes=["a", "Zürich 漢字"]).classes[1] == "Zürich 漢字"
