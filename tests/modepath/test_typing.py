"""The API's types as a type checker reports them to users."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SAMPLE = """
from typing import assert_type

import numpy as np
from numpy.typing import NDArray
from torch import nn

import modepath


def make(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Linear(4, num_classes)


pets = modepath.fge(network=make, data="digits", name="pets", epochs=4, members=2, alpha_1=0.05)
assert_type(pets, modepath.Ensemble)
answer = modepath.load("pets").predict(np.zeros((1, 1, 4, 4)))
assert_type(answer, modepath.Answer)
assert_type(answer.probs, NDArray[np.float64])
assert_type(answer.class_names, list[str])
modepath.load("pets").predict(["a.png", "b.jpg"])
modepath.curve(network="preresnet8", data="digits", name="c", bends=2, shape="polychain")
modepath.soup(network=make, data="digits", name="s", init={"w": 1}, rates=(0.1, 0.01))
modepath.fge(network=make, data="digits", name="pets", epochs="many")  # pyright: ignore[reportArgumentType]
modepath.fge(network=make, data="digits", name="pets", epoch=4)  # pyright: ignore[reportCallIssue]
modepath.snapshot(network=make, data="digits")  # pyright: ignore[reportCallIssue]
pets.nothing  # pyright: ignore[reportAttributeAccessIssue]
"""


def test_a_program_that_uses_it_rightly_has_no_errors_and_one_that_does_not_has(tmp_path):
    checker = Path(sys.executable).with_name("basedpyright")
    if not checker.exists():
        pytest.skip("the type checker is part of the dev extra")
    (tmp_path / "sample.py").write_text(SAMPLE)
    settings = {
        "include": ["."],
        "typeCheckingMode": "standard",
        "extraPaths": [str(ROOT)],
        "reportUnnecessaryTypeIgnoreComment": "error",  # each expected error must be there
        "reportUnusedExpression": "none",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run([checker, "--pythonpath", sys.executable], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
