"""One run in several processes that torchrun starts: the losses of one process, and a new start after a failure."""

import csv
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from models_store.store import Store
from tests.conftest import ROOT
from training import independent
from training.errors import ConfigError
from training.optimisation import hardware

# 20 steps: a step an epoch.
COMMON = (
    "--dataset", "digits", "--network", "mlp", "--network-options", "hidden=16", "--limit", "64", "--batch-size", "64", "--epochs", "20", "--lr", "0.05",
    "--augment", "none", "--precision", "32", "--device", "cpu", "--log", "csv",
)  # fmt: skip
KINDS = {
    "plain": ("training.independent", "--runs", "1"),
    "curve": ("training.curve", "--bank", "0", "--members", "2", "--points-per-step", "2"),
    "simplex": ("training.espro", "--vertices", "2", "--vertex-epochs", "10", "--points-per-step", "2", "--samples", "2", "--bank", "0"),
}  # fmt: skip


def start(folder, processes, *options):
    run = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        "2",
        "--master-port",
        "0",
        "--standalone",
    ]
    return subprocess.Popen(
        [sys.executable, *([*run, "-m", "--"] if processes > 1 else ["-m"]), *options], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MODELS_STORE": str(folder / "store"), "MODEPATH_RUNS": str(folder / "runs")},
    )  # fmt: skip


def losses(folder):
    found = []
    for file in sorted(folder.glob("runs/*/csv/*/metrics.csv")):
        with file.open() as rows:
            found += [float(row["train_loss"]) for row in csv.DictReader(rows)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_one_process(kind, tmp_path):
    of = {}
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        module, *options = KINDS[kind]
        done = start(folder, processes, module, *COMMON, *options, "--name", "e")
        output = done.communicate(timeout=300)[0]
        assert done.returncode == 0, output
        of[processes] = losses(folder)
        assert f"{processes} process" in Store(folder / "store").load("e").manifest.provenance.device
    assert len(of[1]) >= 20
    assert of[2] == pytest.approx(of[1], abs=1e-5)
    assert of[4] == pytest.approx(of[1], abs=1e-5)
    assert of[1][0] > of[1][19]  # it learns


def test_a_process_that_is_killed_is_started_again_and_the_run_goes_on(tmp_path):
    options = [*COMMON]
    options[options.index("--epochs") + 1] = "400"
    process = start(tmp_path, 2, "training.independent", *options, "--runs", "1", "--name", "e")
    lines, killed = [], False
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if not killed and re.search(r"epoch \d{2}/400", line):
            workers = [
                one for one in psutil.Process(process.pid).children(recursive=True) if one.environ().get("RANK") == "1"
            ]
            os.kill(workers[0].pid, signal.SIGKILL)
            killed = True
    process.stdout.close()
    output = "".join(lines)
    assert process.wait(300) == 0, output
    assert killed
    assert "resuming network 1 after epoch" in output
    Store(tmp_path / "store").verify(Store(tmp_path / "store").load("e"))
    assert len(losses(tmp_path)) >= 400


def test_devices_that_differ_from_what_torchrun_started_are_refused(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--devices 3, but torchrun has started 2 processes"):
        hardware.launch(independent.Config(devices=3))
    assert hardware._started_by_torchrun(independent.Config()) == (2, 2)
