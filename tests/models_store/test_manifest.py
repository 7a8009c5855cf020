import json

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
        ({"schema_version": 2}, "schema version 2"),
        ({"surprise": 1}, "surprise"),
        ({"temperature": 0}, "temperature"),
        ({"files": {"../x": "0" * 64}}, "FORMAT.md"),
        ({"members": []}, "members"),
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
