"""FORMAT.md and the schema agree."""

import re
from pathlib import Path

import pytest

import models_store
from models_store import manifest, store
from models_store.records import numbering

TEXT = (Path(models_store.__file__).parent / "FORMAT.md").read_text()
MODELS = [
    "Manifest",
    "Network",
    "InputSpec",
    "TableField",
    "Member",
    "Origin",
    "Scores",
    "Quantization",
    "Geometry",
    "Bank",
    "Calibration",
    "Novelty",
    "Cascade",
    "Provenance",
]


def table(title):
    section = TEXT.split(f"### {title}\n")[1].split("### ")[0]
    return {name: bool(mark) for name, mark in re.findall(r"^\| `(\w+)`( =)? \|", section, re.MULTILINE)}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_lists_the_fields_of_the_schema_and_which_may_be_left_out(name):
    fields = getattr(manifest, name).model_fields
    assert table(name) == {field: not info.is_required() for field, info in fields.items()}


def test_every_table_is_held():
    assert re.findall(r"^### (\w+)$", TEXT, re.MULTILINE) == MODELS


def test_the_constants_are_those_of_the_code():
    assert f"schema versions {manifest.READABLE[0]} to {manifest.READABLE[-1]}" in TEXT
    assert f"ONNX opset {manifest.ONNX_OPSET} " in TEXT
    assert f"{manifest.ECE_BINS} equal-width bins" in TEXT
    assert f"`{manifest.InputSpec(shape=(1, 2, 2)).tensor}`: float32" in TEXT
    assert f"`{manifest.InputSpec(kind='tokens', shape=(1,), vocabulary=2).tensor}`: int64" in TEXT
    assert f"`{manifest.OUTPUT_NAME}`: float32" in TEXT


def test_the_bounds_are_those_of_the_code():
    assert f"at most {manifest.MAX_BYTES} bytes, {manifest.MAX_VALUES} values" in TEXT
    assert (
        f"{manifest.MAX_DEPTH} levels of nesting, {manifest.MAX_MEMBERS} members\nand {manifest.MAX_FILES} files"
        in TEXT
    )
    assert TEXT.count(f"from {manifest.MIN_TEMPERATURE:g} to {manifest.MAX_TEMPERATURE:g}") == 4
    assert f"`<name>` MUST match `{store.NAME_PATTERN.pattern}`" in TEXT
    assert f"`<version>` MUST match `{numbering.NUMBER.pattern}`" in TEXT
