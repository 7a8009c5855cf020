"""What a service takes over time: 200 deaths of a worker, 20 restarts of the service, and a soak at half load.

    python -m benchmarks.faults.restarts [--deaths 200] [--restarts 20] [--minutes 60]

After each part: temporary files, open files, threads and memory of the whole service. A leak grows; what is level is right. The table goes to
benchmarks/results/restarts.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
from tabulate import tabulate

from benchmarks.serving.throughput import NAME, SHAPE, expected, publish
from models_store.store import Store
from tests.service.conftest import Server, workers_of

RESULT = Path(__file__).parents[1] / "results/restarts.md"
IMAGES = np.random.default_rng(0).random((8, *SHAPE), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deaths", type=int, default=200)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, temporary = Store(folder / "store"), folder / "tmp"
        temporary.mkdir()
        members = publish(store.root, 12)
        right = np.stack([expected(members, image[None]) for image in IMAGES])
        rows: list[tuple] = []
        for number in range(args.restarts):
            server = started(store, folder, temporary)
            if number in (0, args.restarts - 1):
                rows.append((f"service started {number + 1} times", *taken(server, temporary)))
            code = server.stop()
            assert code == 0, f"exit code {code}"
            assert not list(temporary.iterdir()), list(temporary.iterdir())
        rows.append((f"after {args.restarts} restarts", len(list(temporary.iterdir())), "", "", ""))
        write(rows, args)
        server = started(store, folder, temporary)
        try:
            for number in range(args.deaths):
                victim = workers_of(server)[number % 2]
                os.kill(victim.pid, signal.SIGKILL)
                back(server, victim.pid, 3 + number)
                if number in (9, args.deaths // 2, args.deaths - 1):
                    settled(server)
                    rows.append((f"{number + 1} workers killed", *taken(server, temporary)))
                    write(rows, args)
            soak(server, temporary, right, args, rows)
        finally:
            server.stop()
        rows.append(("after the end", len(list(temporary.iterdir())), "", "", ""))
        write(rows, args)


def write(rows: list[tuple], args: argparse.Namespace) -> None:
    """Write the table as far as it goes: a run that is cut off keeps what it has."""
    text = tabulate(
        rows, headers=("", "temporary files", "open files", "threads", "memory, MiB"), tablefmt="pipe", floatfmt=".0f"
    )
    print(tabulate(rows[-1:], tablefmt="plain"), flush=True)
    RESULT.write_text(
        "# Restarts and a soak\n\n"
        f"`python -m benchmarks.faults.restarts --deaths {args.deaths} --restarts {args.restarts} --minutes {args.minutes:g}`: two workers, {NAME} of twelve "
        f"members; every answer was compared.\n\n{text}\n"
    )


def started(store: Store, folder: Path, temporary: Path) -> Server:
    server = Server(
        store, folder, MODEPATH_WORKERS="2", MODEPATH_THREADS="1", TMPDIR=str(temporary), MODEPATH_POLL_SECONDS="0.5"
    )
    server.until(200)
    settled(server)
    return server


def settled(server: Server) -> None:
    """Wait until two workers serve, then send some requests."""
    deadline = time.monotonic() + 60
    while len(workers_of(server)) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)
    for _ in range(20):
        answer = httpx.post(server.url + "/predict", json={"inputs": IMAGES.tolist()})
        assert answer.status_code == 200, answer.text
    time.sleep(1)


def back(server: Server, dead: int, served: int) -> None:
    """Wait until a new worker has loaded the ensemble. One that is killed while it loads counts as a death by the version."""
    deadline = time.monotonic() + 60
    while len([worker for worker in workers_of(server) if worker.pid != dead]) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while server.log.read_text().count(f"serving {NAME}@") < served:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)


def taken(server: Server, temporary: Path) -> tuple[int, int, int, float]:
    """Temporary files, open files, threads and MiB of all processes of the service."""
    main = psutil.Process(server.process.pid)
    files = threads = memory = 0
    for one in [main, *main.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            files += one.num_fds()
            threads += one.num_threads()
            memory += one.memory_info().rss
    return sum(1 for path in temporary.rglob("*") if path.is_file()), files, threads, memory / 2**20


def soak(server: Server, temporary: Path, right: np.ndarray, args: argparse.Namespace, rows: list[tuple]) -> None:
    """Ask at half of the capacity, which is measured first."""
    minutes = args.minutes
    with httpx.Client(base_url=server.url, timeout=30) as client:

        def ask() -> float:
            began = time.perf_counter()
            answer = client.post("/predict", json={"inputs": IMAGES.tolist()})
            spent = time.perf_counter() - began
            probs = np.array([row["probs"] for row in answer.json()["predictions"]])
            assert np.abs(probs - right).max() < 1e-5, "a wrong answer"
            return spent

        for _ in range(50):
            ask()
        pause = statistics.median(ask() for _ in range(100))  # as long as an answer takes: half load
        began, count, next_row = time.monotonic(), 0, 1.0
        while (passed := (time.monotonic() - began) / 60) < minutes:
            if passed >= next_row:
                rows.append((f"soak, minute {next_row:.0f}, {count} requests", *taken(server, temporary)))
                write(rows, args)
                next_row += max(1.0, minutes / 6)
            ask()
            count += 1
            time.sleep(pause)
        rows.append((f"soak, minute {minutes:.0f}, {count} requests", *taken(server, temporary)))


if __name__ == "__main__":
    main()
