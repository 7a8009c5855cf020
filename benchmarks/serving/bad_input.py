"""Bad input, and what honest clients notice of it.

python -m benchmarks.serving.bad_input              how long every bad input of tests/service/bad_requests.py takes to be refused
python -m benchmarks.serving.bad_input --attack     honest requests while hostile ones (benchmarks/serving/hostile.py) run from eight
connections for 30 s each; the table goes to benchmarks/results/bad_input.md
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from urllib.parse import urlparse

import httpx
import numpy as np
import psutil
from tabulate import tabulate

from benchmarks.serving.hostile import ATTACKS, CONNECTIONS
from benchmarks.serving.throughput import FORMS, ROOT, Arm, check, expected, running, write_bodies
from benchmarks.serving.throughput import publish as publish_small
from benchmarks.serving.workers import Load
from models_store.store import Store
from models_store.uncertainty import softmax
from tests.onnx_members import SHAPE, linear, linear_logits, publish
from tests.service import bad_requests

ROUNDS = 5
RESULT = ROOT / "benchmarks/results/bad_input.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attack", action="store_true", help="measure honest requests under hostile ones")
    parser.add_argument("--seconds", type=float, default=30, help="how long each attack runs")
    parser.add_argument("--only", help="one attack; the results file is not written")
    args = parser.parse_args()
    if args.attack:
        under_attack(args)
    else:
        refusals()


class Honest:
    """Clients that ask for one image, or for /livez, twenty times a second each, and how long they waited."""

    def __init__(self, url: str, right: np.ndarray, bodies: dict[str, bytes]):
        self.url, self.right, self.bodies = url, right, bodies
        self.seconds: dict[str, list[float]] = {"one image": [], "/livez": []}
        self.lost: list[str] = []
        self._stop = threading.Event()
        asking = [self._predict] * 3 + [self._live]
        self._threads = [threading.Thread(target=self._run, args=(ask,), daemon=True) for ask in asking]

    def __enter__(self) -> Honest:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, ask: Callable[[httpx.Client, int], str]) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as client:
            for number in itertools.count():
                began = time.perf_counter()
                try:
                    self.seconds[ask(client, number)].append(time.perf_counter() - began)
                except Exception as error:
                    self.lost.append(f"{type(error).__name__}: {error}")
                if self._stop.wait(0.05):
                    return

    def _predict(self, client: httpx.Client, number: int) -> str:
        form = list(self.bodies)[number % 2]
        answer = client.post("/predict", content=self.bodies[form], headers={"Content-Type": FORMS[form]})
        answer.raise_for_status()
        assert np.abs(np.array(answer.json()["predictions"][0]["probs"]) - self.right).max() < 1e-5
        return "one image"

    def _live(self, client: httpx.Client, number: int) -> str:
        client.get("/livez").raise_for_status()
        return "/livez"


def under_attack(args: argparse.Namespace) -> None:
    """Print, and keep, the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        members = publish_small(Path(folder) / "store", 12, resize="crop")
        bodies = write_bodies(Path(folder))
        right = expected(members, bodies["npy"][1])
        texts = {form: script.with_suffix("").read_bytes() for form, (script, _) in bodies.items()}
        arm = Arm("modepath", ["bentoml", "serve", "--port", "{port}"], {"MODELS_STORE": str(Path(folder) / "store")})
        for attack in [None, *(name for name in ATTACKS if args.only in (None, name))]:
            with running(arm) as (url, process):  # each attack meets a fresh service
                check(url, bodies["npy"][0].with_suffix(""), "npy", "ours", right)
                rows.append(_attacked(attack, url, process, right, texts, args.seconds))
                print(rows[-1], flush=True)
    heads = [
        "attack",
        "attempts",
        "honest answers",
        "lost",
        "p50 ms",
        "p99 ms",
        "slowest ms",
        "/livez p99 ms",
        "most memory MiB",
    ]
    table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    print(table)
    if args.only is None:
        RESULT.write_text(
            f"# Honest requests while others attack\n\n`python -m benchmarks.serving.bad_input --attack`: twelve preresnet8 members, one worker, "
            f"{len(os.sched_getaffinity(0))} cores shared with attackers and clients; each attack from {CONNECTIONS} connections for {args.seconds:g} s. "
            f"Three clients ask for one image (JSON and npy in turn) and one for /livez, each twenty times a second at most, without retries.\n\n{table}\n"
        )


def _attacked(
    attack: str | None, url: str, process: psutil.Process, right: np.ndarray, texts: dict[str, bytes], seconds: float
) -> list[str]:
    address, most = urlparse(url), 0
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving.hostile",
        attack or "",
        address.hostname,
        str(address.port),
        str(seconds),
    ]
    with Honest(url.removesuffix("/predict"), right, texts) as honest:
        hostile = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) if attack else None
        deadline = time.monotonic() + (seconds if attack is None else 3600)
        while time.monotonic() < deadline and (hostile is None or hostile.poll() is None):
            with contextlib.suppress(psutil.NoSuchProcess):
                most = max(most, *(one.memory_info().rss for one in process.children(recursive=True)))
            time.sleep(0.1)
        attempts = json.loads(hostile.communicate()[0])["attempts"] if hostile else 0
    images, live = (1000 * np.array(honest.seconds[what]) for what in ("one image", "/livez"))
    for failure, count in Counter(honest.lost).most_common(3):
        print(f"  lost {count}: {failure}")
    return [
        attack or "none", str(attempts), str(len(images) + len(live)), str(len(honest.lost)), f"{np.percentile(images, 50):.0f}",
        f"{np.percentile(images, 99):.0f}", f"{max(images.max(), live.max()):.0f}", f"{np.percentile(live, 99):.0f}", f"{most / 2**20:.0f}",
    ]  # fmt: skip


def refusals() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        publish(store, "animals", seeds=(0, 1, 2))
        images = np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32)
        right = np.mean([softmax(linear_logits(linear(seed), images)) for seed in (0, 1, 2)], axis=0)
        environment = {
            "MODELS_STORE": str(store.root), "MODEPATH_WORKERS": "2", "MODEPATH_MAX_ROWS": "64", "MODEPATH_STALL_SECONDS": "0.5",
        }  # fmt: skip
        arm = Arm("modepath", ["bentoml", "serve", "--port", "{port}"], environment)
        body = write_bodies(Path(folder), images)["npy"][0].with_suffix("")
        with running(arm) as (url, _):
            check(url, body, "npy", "ours", right[0])
            address = urlparse(url).hostname, urlparse(url).port
            cases = bad_requests.requests(body_limit=16 * 2**20, rows_limit=64, elsewhere="http://127.0.0.1:9/a.png")
            seconds: dict[str, list[float]] = {}
            with Load(url.removesuffix("/predict"), {1: right}, images) as load:
                for _ in range(ROUNDS):
                    for case in cases:
                        began = time.perf_counter()
                        status, _ = bad_requests.answer(address, case.request)
                        seconds.setdefault(case.what, []).append(time.perf_counter() - began)
                        assert status == case.status, (case.what, status)
    slowest = sorted(seconds, key=lambda what: -max(seconds[what]))
    print(
        f"{len(cases)} bad inputs, {ROUNDS} times each: all refused as expected; median {statistics.median(chain.from_iterable(seconds.values())):.3f} s"
    )
    for what in slowest[:8]:
        print(f"  {max(seconds[what]):.2f} s at most, median {statistics.median(seconds[what]):.2f} s: {what}")
    print(f"meanwhile {len(load.answers)} good answers, {load.wrong} wrong, {len(load.failures)} lost")


if __name__ == "__main__":
    main()
