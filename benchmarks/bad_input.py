"""How long every bad input of tests/service/bad_requests.py takes to be refused, while eight clients ask good questions.

python -m benchmarks.bad_input
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path
from urllib.parse import urlparse

import numpy as np

from benchmarks.serving import Arm, check, running, write_bodies
from benchmarks.workers import Load
from models_store.store import Store
from models_store.uncertainty import softmax
from tests.onnx_members import SHAPE, linear, linear_logits, publish
from tests.service import bad_requests

ROUNDS = 5


def main() -> None:
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
