"""Every method, killed at any moment: the repeated command publishes the same bits as an uninterrupted one."""

import os
import subprocess
import sys
import time

import pytest

from models_store.store import Store
from tests.conftest import ROOT
from tests.training import forked

COMMON = [
    "--dataset", "digits", "--network", "preresnet8", "--network-options", "width=0.5", "--batch-size", "32", "--limit", "480",
    "--name", "r",
]  # fmt: skip
# Every method must have options here: each is killed and resumed.
OPTIONS = {
    "fge": "--epochs 12 --members 3",
    "independent": "--epochs 4 --runs 2 --transforms RandAugment mixup --draw balanced --class-weights balanced",
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


def run(method, output, **environment):
    """Run the method's command to its end; returns what it printed."""
    process = forked.start(f"training.{method}", [*COMMON, *OPTIONS[method].split()], output, **environment)
    process.join()
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_taken_up_again_it_publishes_the_same_bits(method, tmp_path):
    run(method, tmp_path / "calm.log", MODELS_STORE=str(tmp_path / "calm"), MODEPATH_RUNS=str(tmp_path / "calm-runs"))
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
        log.touch()
        process = forked.start(f"training.{method}", [*COMMON, *OPTIONS[method].split()], log)
        deadline = time.monotonic() + 120
        while not reached(log.read_text().splitlines()):
            assert process.is_alive(), f"ended before {moment}: {log.read_text()}"
            assert time.monotonic() < deadline, moment
            time.sleep(0.005)
        process.kill()  # SIGKILL
        process.join()
        assert store.names() == [], moment
    run(method, tmp_path / "resumed.log")
    assert contents(store) == contents(Store(tmp_path / "calm"))
    store.verify(store.load("r"))
    assert not list(store.root.glob("r/.staging-*"))
    assert "already finished: this run published r@1" in run(method, tmp_path / "again.log")
    assert store.versions("r") == [1]


def test_stopped_by_sigterm_it_says_so_with_its_own_exit_code_and_resumes_bit_identically(tmp_path):
    command = [sys.executable, "-m", "training.fge", *COMMON, *OPTIONS["fge"].split()]

    def environment(name):
        return {**os.environ, "MODELS_STORE": str(tmp_path / name), "MODEPATH_RUNS": str(tmp_path / f"{name}-runs")}

    subprocess.run(command, env=environment("calm"), cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(
        command, env=environment("stopped"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "epoch 2/" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.strip().splitlines()[-1] == "stopped by SIGTERM; the same command resumes from the last finished epoch"
    assert "Traceback" not in said
    again = subprocess.run(command, env=environment("stopped"), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "resuming" in again.stdout
    assert contents(Store(tmp_path / "calm")) == contents(Store(tmp_path / "stopped"))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_in_one_line_and_the_command_resumes_when_there_is_space(
    tmp_path,
):
    command = [sys.executable, "-m", "training.fge", *COMMON, *OPTIONS["fge"].split()]
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("it may not mount a file system here")
    try:
        environment = {**os.environ, "MODELS_STORE": str(tmp_path / "store"), "MODEPATH_RUNS": str(disk)}
        full = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert full.returncode == 2, full.stdout + full.stderr
        assert "Traceback" not in full.stderr
        assert "the same command resumes" in full.stderr.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    calm = {**os.environ, "MODELS_STORE": str(tmp_path / "calm"), "MODEPATH_RUNS": str(tmp_path / "runs")}
    subprocess.run(command, env=calm, cwd=ROOT, check=True, capture_output=True)
    assert contents(Store(tmp_path / "calm")) == contents(Store(tmp_path / "store"))
