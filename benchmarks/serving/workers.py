"""Activations and the death of a worker, under load: does anybody notice, and for how long?

    python -m benchmarks.serving.workers

Two versions of twelve preresnet8 members, two workers, eight clients without retries. First 20 activations back and forth: every answer must
be wholly of the version it names; how long does the old one go on? Then a worker is killed five times: only requests on its own connections
may fail, and the metrics must still count every answer.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

from benchmarks.serving.throughput import NAME, SHAPE, Arm, check, expected, publish, running, write_bodies
from models_store.store import Store
from service.client import Client

WORKERS, CLIENTS, TURNS, DEATHS = 2, 8, 20, 5


class Load:
    """Clients that ask without pause, and what they saw."""

    def __init__(self, url: str, right: dict[int, np.ndarray], images: np.ndarray):
        self.url, self.right, self.images = url, right, images
        self.answers: list[tuple[float, int]] = []
        self.failures: list[tuple[float, Exception]] = []
        self.wrong = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        with Client(self.url, attempts=1) as client:
            while not self._stop.is_set():
                try:
                    answer = client.predict(self.images)
                except Exception as error:
                    self.failures.append((time.perf_counter(), error))
                    continue
                self.answers.append((time.perf_counter(), answer.version))
                if np.abs(answer.probs - self.right[answer.version]).max() > 1e-5:
                    self.wrong += 1


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        members = {1: publish(root, 12), 2: publish(root, 12, seed=100)}
        images = np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32)
        right = {number: expected(files, images)[None] for number, files in members.items()}
        environment = {"MODELS_STORE": str(root), "MODEPATH_WORKERS": str(WORKERS), "MODEPATH_THREADS": "1"}
        arm = Arm("modepath", ["bentoml", "serve", "--port", "{port}"], environment)
        script, image = write_bodies(Path(folder))["npy"]
        with running(arm) as (url, process):
            check(url, script.with_suffix(""), "npy", "ours", expected(members[2], image))
            url = url.removesuffix("/predict")
            activations(url, Store(root), right, images)
            deaths(url, process, right, images)


def activations(url: str, store: Store, right: dict[int, np.ndarray], images: np.ndarray) -> None:
    seconds = []
    with Load(url, right, images) as load:
        time.sleep(1)
        for turn in range(TURNS):
            wanted = 1 + turn % 2
            began = time.perf_counter()
            store.activate(NAME, wanted)
            time.sleep(2.5)
            # The last answer of the other version is when the last worker switched.
            late = [moment for moment, version in list(load.answers) if moment > began and version != wanted]
            seconds.append(max(late, default=began) - began)
    print(f"{TURNS} activations: {len(load.answers)} answers, {len(load.failures)} failed, {load.wrong} mixed or wrong")
    print(
        f"  last answer of the old version: median {np.median(seconds):.2f} s, most {max(seconds):.2f} s after activation"
    )


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if "--worker-id" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def counted(url: str) -> float:
    text = httpx.get(url + "/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("modepath_queue_seconds_count"))


def deaths(url: str, process: psutil.Process, right: dict[int, np.ndarray], images: np.ndarray) -> None:
    before = counted(url)
    lost, gone, back, answered = [], [], [], 0
    for _ in range(DEATHS):
        victim = workers_of(process)[0]
        with Load(url, right, images) as load:
            time.sleep(1.5)
            connections = sum(c.status == psutil.CONN_ESTABLISHED for c in victim.net_connections("tcp"))
            began = time.perf_counter()
            os.kill(victim.pid, signal.SIGKILL)
            # Back is when a new worker has answered: then it has written numbers of its own.
            while not (len(fresh := workers_of(process)) == WORKERS and all(map(has_answered, fresh))):
                with Client(url) as fresh_connection:
                    fresh_connection.predict(images)
                answered += 1
            back.append(time.perf_counter() - began)
            time.sleep(1)
        assert not load.wrong
        lost.append(len(load.failures))
        gone.append(max((moment - began for moment, _ in load.failures), default=0.0))
        answered += len(load.answers)
        print(
            f"killed a worker with {connections} connections: {len(load.failures)} of {len(load.answers)} requests failed, the last "
            f"{gone[-1]:.2f} s after; back after {back[-1]:.2f} s",
            flush=True,
        )
    missing = answered - (counted(url) - before)
    # A request that was counted and whose answer died with its worker makes the metrics larger, never smaller.
    print(
        f"  most lost {max(lost)}, slowest return {max(back):.2f} s; metrics: {answered} answers, {-missing:.0f} more were counted"
    )


def has_answered(worker: psutil.Process) -> bool:
    try:
        folder = Path(worker.environ()["MODEPATH_METRICS_FOLDER"])
    except (psutil.NoSuchProcess, KeyError):
        return False
    return (folder / f"histogram_{worker.pid}.db").exists()


if __name__ == "__main__":
    main()
