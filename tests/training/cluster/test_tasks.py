"""Trainings as tasks of Ray, on clusters of this machine."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from models_store.store import Store
from tests.conftest import ROOT
from training import independent
from training.cluster import code
from training.errors import ConfigError, RunError
from training.optimisation.session import Session

pytest.importorskip("ray", reason="the ray extra is not installed")
OPTIONS = ("--dataset", "digits", "--network", "preresnet8", "--network-options", "width=1.0", "--epochs", "30", "--runs", "3", "--name", "d")  # fmt: skip


def start(folder, *options, store="store"):
    return subprocess.Popen(
        [sys.executable, "-m", "training.independent", *OPTIONS, *options], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MODELS_STORE": str(folder / store), "MODEPATH_RUNS": str(folder / f"runs-{store}"), "RAY_TMPDIR": "/tmp"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def hashes(folder, store):
    version = Store(folder / store).load("d")
    Store(folder / store).verify(version)
    return [hashlib.sha256((version.folder / member.file).read_bytes()).hexdigest() for member in version.manifest.members]  # fmt: skip


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    done = start(folder)
    assert done.wait(300) == 0, done.stdout.read()
    done.stdout.close()
    return hashes(folder, "store")


def test_members_are_those_of_a_local_training_bit_for_bit(tmp_path, local):
    done = start(tmp_path, "--ray", "local")
    output = done.communicate(timeout=300)[0]
    assert done.returncode == 0, output
    assert hashes(tmp_path, "store") == local
    assert "3 tasks on the Ray cluster" in output
    assert "finished 3 of 3 tasks" in output
    assert "network 2 epoch 30/30" in output  # what nodes say is shown here


def test_a_process_that_is_killed_costs_one_task_its_last_epoch_and_the_result_is_the_same(tmp_path, local):
    process = start(tmp_path, "--ray", "local")
    lines = []
    killed = None
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if killed is None and "epoch 5/30" in line:
            workers = [one for one in psutil.Process(process.pid).children(recursive=True) if "ray::_trained" in " ".join(one.cmdline())]  # fmt: skip
            killed = workers[0].pid
            os.kill(killed, signal.SIGKILL)
    process.stdout.close()
    output = "".join(lines)
    assert process.wait(300) == 0, output
    assert killed is not None, output
    assert hashes(tmp_path, "store") == local
    assert "resuming network" in output


def test_an_interrupted_command_stops_its_tasks_and_the_same_command_resumes(tmp_path, local):
    process = start(tmp_path, "--ray", "local")
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 5/30" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, rest
    deadline = time.monotonic() + 30
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in children) and time.monotonic() < deadline:  # fmt: skip
        time.sleep(0.2)
    assert not [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    again = start(tmp_path, "--ray", "local")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert "resuming network" in output
    assert hashes(tmp_path, "store") == local


def test_a_command_that_is_terminated_says_how_to_resume(tmp_path):
    process = start(tmp_path, "--ray", "local")
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 2/30" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 143, rest
    assert "stopped by SIGTERM; the same command resumes" in rest


OWN = """
import torch
def make(classes, shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes){more})
"""


def test_a_file_with_the_users_network_is_sent_to_nodes_that_do_not_have_it(tmp_path):
    (tmp_path / "net.py").write_text(OWN.format(more=""))
    found = []
    for ray in ((), ("--ray", "local")):
        done = start(tmp_path, "--network", "net.py:make", "--network-options", *ray, store=f"store{len(ray)}")
        output = done.communicate(timeout=300)[0]
        assert done.returncode == 0, output
        found.append(hashes(tmp_path, f"store{len(ray)}"))
    assert found[0] == found[1]


def test_an_object_is_sent_to_the_nodes_by_value(tmp_path):
    program = """
import modepath, torch
class Own(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear = torch.nn.Linear(64, classes)
    def forward(self, images):
        return self.linear(images.flatten(1))
def make(classes, shape):
    return Own(classes)
if __name__ == "__main__":
    found = modepath.independent(network=make, data="digits", epochs=2, runs=2, name="own", ray="local")
    print("published", found.name)
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MODELS_STORE": str(tmp_path / "s"), "MODEPATH_RUNS": str(tmp_path / "r")}  # fmt: skip
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert "published own@1" in done.stdout, done.stdout + done.stderr


def test_a_node_with_another_network_version_or_torch_is_refused(monkeypatch):
    session = Session.open(independent.Config(dataset="digits", network="mlp", limit=200))
    expected = code.of_command(session)
    code.check(session, expected)
    with pytest.raises(RunError, match=r"has torch .* the command 1\.0"):
        code.check(session, {**expected, "torch": "1.0"})
    with pytest.raises(RunError, match="another version of modepath"):
        code.check(session, {**expected, "sources": "0"})
    other = Session.open(independent.Config(dataset="digits", network="mlp", limit=200, network_options=("hidden=7",)))
    with pytest.raises(RunError, match=r"--network mlp is another network than where the command runs"):
        code.check(other, expected)


def test_a_loss_that_diverges_ends_the_command_in_one_line(tmp_path):
    done = start(tmp_path, "--ray", "local", "--lr", "1e30")
    output = done.communicate(timeout=300)[0]
    assert done.returncode == 2, output
    assert output.splitlines()[-1].startswith("error: The loss became")


def test_a_cluster_that_does_not_answer_is_said_in_one_line(tmp_path):
    done = start(tmp_path, "--ray", "127.0.0.1:9")
    output = done.communicate(timeout=300)[0]
    assert done.returncode == 2
    assert "The Ray cluster '127.0.0.1:9' does not answer" in output


@pytest.mark.parametrize("options", [{"devices": 2}, {"log": "csv"}, {"ray_cpus": 0}, {"ray_gpus": -1}])
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(ConfigError, match="--ray"):
        independent.Config(ray="local", **options)
