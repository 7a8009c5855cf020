import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine must not fail a property.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

ROOT = Path(__file__).parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker per core, each with one thread; otherwise the workers' threads spin while they wait for each other.
    os.environ.update(OMP_NUM_THREADS="1", MODEPATH_THREADS="1")


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Point all settings at temporary folders, so that no test touches the developer's store, runs or server state."""
    monkeypatch.setenv("MODELS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MODEPATH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MODEPATH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODEPATH_FEEDBACK", "off")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setenv("BENTOML_DO_NOT_TRACK", "True")


@pytest.fixture
def command(tmp_path):
    """Run `python -m …` as a user would, in a temporary folder."""

    def command(*arguments, timeout=300, **environment):
        return subprocess.run(
            [sys.executable, "-m", *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=timeout,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", **environment},
        )  # fmt: skip

    return command
