"""Inputs that fuzzing found to reach the most: none of them raises what its callers do not handle."""

from pathlib import Path

import pytest

fuzz_targets = pytest.importorskip("tests.fuzz_targets", reason="it needs the service")
CORPORA = Path(__file__).parent / "corpora"


@pytest.mark.parametrize("target", sorted(fuzz_targets.TARGETS))
def test_every_input_of_the_corpus_is_handled(target):
    files = sorted((CORPORA / target).iterdir())
    assert len(files) >= 10
    for file in files:
        fuzz_targets.TARGETS[target](file.read_bytes())


@pytest.mark.parametrize("target", sorted(fuzz_targets.TARGETS))
def test_the_beginnings_of_every_input_are_handled(target):
    for file in sorted((CORPORA / target).iterdir())[::4]:
        content = file.read_bytes()
        for length in range(0, len(content), max(1, len(content) // 16)):
            fuzz_targets.TARGETS[target](content[:length])
