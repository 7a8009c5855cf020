"""Trials of ensembles in real processes."""

import hashlib
import os
import signal
import threading
import time
from multiprocessing import get_context

import psutil
import pytest

from models_store import lineage
from service.inference.batching import QueueLimits
from service.inference.look import Candidate
from service.inference.opening import Recipe
from service.inference.policy import Policy
from service.inference.trial import Trials
from service.inference.verdicts import RefusedError, Verdicts
from tests import onnx_members
from tests.onnx_members import publish, publish_broken

LIMITS = QueueLimits(batch_rows=8, batch_seconds=0.05, rows=64, seconds=2)
RECIPE = Recipe(Policy(), "cpu", 1, 2**30)


@pytest.fixture
def trials(store, tmp_path):
    made = []

    def trials(seconds=60.0, most_bytes=2**30, verdicts=None):
        verdicts = verdicts or Verdicts(tmp_path / "verdicts")
        made.append(Trials(store, LIMITS, verdicts, seconds=seconds, most_bytes=most_bytes, workers=1))
        return made[-1]

    yield trials
    for one in made:
        one.close()


def candidate(version):
    return Candidate(version.manifest.name, version.manifest.version, digest_of(version), "activated once")


def digest_of(version):
    return hashlib.sha256((version.folder / "manifest.json").read_bytes()).hexdigest()


def children():
    return psutil.Process().children(recursive=True)


def the_one_that_forks():
    """The process that forks the trials, after every trial has ended."""
    deadline = time.monotonic() + 20
    while len(found := children()) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    [one] = found
    return one


def test_a_good_version_passes_and_its_networks_are_known(store, trials):
    bank = onnx_members.bank(points=4)
    good = candidate(publish(store, "good", bank=bank))
    trial = trials()
    for policy in (Policy(), Policy(modes=("random",)), Policy(modes=("keyed", "average"))):
        trial.opens(good, Recipe(policy, "cpu", 1, 2**30))
    known = trial.known(good)
    assert known.networks == 4
    assert known.marks == lineage.marks(store.load("good"))


BROKEN = {
    "without end": ({"loop": 2**62}, "MODEPATH_LOAD_SECONDS"),
    "too large": ({"allocated": 2**29}, "MODEPATH_LOAD_BYTES"),
    "far too large": ({"allocated": 2**45}, "fails on a plain image"),
    "nan": ({"nan": True}, "NaN"),
    "name": ({"surrogate": True}, "bad@1"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_version_is_refused_and_named_once_and_the_next_one_passes(store, trials, caplog, how):
    harm, said = BROKEN[how]
    bad = candidate(publish_broken(store, "bad", **harm))
    trial = trials(seconds=3 if how == "without end" else 60, most_bytes=2**29)
    for _ in range(2):
        with pytest.raises(RefusedError):
            trial.opens(bad, RECIPE)
    [record] = caplog.records
    assert record.message.startswith(f"bad@1 (manifest {bad.digest[:12]})")
    assert said in record.message
    trial.opens(candidate(publish(store, "good")), RECIPE)
    assert the_one_that_forks()


def test_a_version_whose_files_are_larger_than_the_limit_is_refused_unopened(store, trials, caplog):
    with pytest.raises(RefusedError):
        trials(most_bytes=100).opens(candidate(publish(store, "a")), RECIPE)
    assert "MODEPATH_LOAD_BYTES" in caplog.text


def test_a_version_that_ends_its_process_is_refused(store, trials, caplog):
    bad = candidate(publish_broken(store, "bad", loop=2**62))
    trial = trials(seconds=60)

    def end():
        while len(children()) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        trying = max(children(), key=lambda child: child.create_time())
        trying.send_signal(signal.SIGSEGV)

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(RefusedError):
        trial.opens(bad, RECIPE)
    ending.join()
    assert "ended without an answer" in caplog.text


def test_where_the_process_that_forks_is_gone_another_is_started(store, trials):
    trial = trials()
    trial.opens(candidate(publish(store, "a")), RECIPE)
    forking = the_one_that_forks()
    forking.kill()
    forking.wait()
    trial.opens(candidate(publish(store, "b")), RECIPE)


def test_what_was_tried_is_not_tried_again_by_another_worker(store, trials, monkeypatch, caplog):
    good, bad = candidate(publish(store, "good")), candidate(publish_broken(store, "bad", nan=True))
    first = trials()
    first.opens(good, RECIPE)
    with pytest.raises(RefusedError):
        first.opens(bad, RECIPE)
    second = trials()
    monkeypatch.setattr(second, "_run", None)
    second.opens(good, RECIPE)
    with pytest.raises(RefusedError, match="NaN"):
        second.opens(bad, RECIPE)
    assert len(caplog.records) == 1


def test_what_is_activated_anew_is_tried_again(store, trials, caplog):
    bad = candidate(publish_broken(store, "bad", nan=True))
    trial = trials()
    for token in ("once", "twice"):
        with pytest.raises(RefusedError):
            trial.opens(Candidate(bad.name, bad.number, bad.digest, token), RECIPE)
    assert len(caplog.records) == 2


def hang(store, folder):
    trial = Trials(store, LIMITS, Verdicts(folder), seconds=600, most_bytes=2**30, workers=1)
    trial.opens(candidate(store.load("bad")), RECIPE)


def test_trials_end_with_the_worker_that_wanted_them(store, tmp_path):
    publish_broken(store, "bad", loop=2**62)
    worker = get_context("spawn").Process(target=hang, args=(store, tmp_path / "verdicts"))
    worker.start()
    found = []
    deadline = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        found = psutil.Process(worker.pid).children(recursive=True)
    assert len(found) == 2
    time.sleep(0.5)  # time for it to start computing
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    _, alive = psutil.wait_procs(found, timeout=20)
    assert not alive


def test_a_trial_that_ends_while_its_memory_is_looked_at_has_passed(store, trials, monkeypatch):
    looked = []

    def ended(process):
        looked.append(process)
        psutil.wait_procs([process], 20)
        raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(psutil.Process, "memory_info", ended)
    monkeypatch.setattr("service.inference.trial.WATCH_SECONDS", 0.001)
    trials().opens(candidate(publish(store, "a")), RECIPE)
    assert looked
