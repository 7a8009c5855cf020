"""Every method, killed at any moment: the repeated command publishes the same bits as an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from models_store.store import Store
from tests.conftest import ROOT

COMMON = [
    "--dataset", "digits", "--network", "preresnet8", "--network-options", "width=0.5", "--batch-size", "32", "--name", "r",
]  # fmt: skip
# Every method must have options here: each is killed and resumed.
OPTIONS = {
    "fge": "--epochs 12 --members 3",
    "independent": "--epochs 4 --runs 2",
    "snapshot": "--epochs 4 --cycles 2 --runs 2",
    "csgmcmc": "--epochs 6 --cycles 2 --samples 2 --runs 2",
    "curve": "--epochs 6 --end-epochs 2 --bends 2 --bank 40 --members 3",
    "espro": "--epochs 4 --vertices 2 --vertex-epochs 2 --points-per-step 2 --samples 3 --bank 40",
    "swag": "--epochs 8 --runs 2 --samples 3",
    "soup": "--epochs 4 --last 3 --rates 0.1 0.05",
}
METHODS = sorted(f.stem for f in (ROOT / "training").glob("*.py") if "pipeline.run(config, plan)" in f.read_text())


def contents(store):
    version = store.load("r")
    files = {f: (version.folder / f).read_bytes() for f in version.manifest.files}
    return files, {
        k: v for k, v in version.manifest.model_dump().items() if k not in ("created", "provenance", "digest")
    }


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_taken_up_again_it_publishes_the_same_bits(method, command, tmp_path):
    arguments = [f"training.{method}", *COMMON, *OPTIONS[method].split()]
    calm = command(*arguments, MODELS_STORE=str(tmp_path / "calm"), MODEPATH_RUNS=str(tmp_path / "calm-runs"))
    assert calm.returncode == 0, calm.stderr
    store, runs = Store(tmp_path / "store"), tmp_path / "runs"
    moments = {
        "in the first leg": lambda lines: sum(" epoch " in line for line in lines) >= 1,
        "in a later leg": lambda lines: (
            any(" epoch " in line and "epoch 3" in line for line in lines) or bool(list(runs.glob("*/vertices/01-*")))
        ),
        "while publishing": lambda lines: bool(list(store.root.glob("r/.staging-*/members/*.onnx"))),
    }
    if method in ("curve", "espro"):
        moments["in the bank"] = lambda lines: len(list(runs.glob("*/bank/*.safetensors"))) >= 3
    for moment, reached in moments.items():
        log = tmp_path / f"{moment}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", *arguments], stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            deadline = time.monotonic() + 120
            while not reached(log.read_text().splitlines()):
                assert process.poll() is None, f"ended before {moment}: {log.read_text()}"
                assert time.monotonic() < deadline, moment
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert store.names() == [], moment
    resumed = command(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert contents(store) == contents(Store(tmp_path / "calm"))
    store.verify(store.load("r"))
    assert not list(store.root.glob("r/.staging-*"))
    assert "already finished: this run published r@1" in command(*arguments).stdout
    assert store.versions("r") == [1]
