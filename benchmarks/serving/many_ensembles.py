"""How long a service takes until all of many ensembles answer, and the memory of its worker.

    python -m benchmarks.serving.many_ensembles --count 200

Ensembles of six preresnet8 members with random weights, all the same but for their names; one worker. First from a service that has tried none
of them, then after its worker was killed: the new one need not try them again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import httpx
import psutil
from tabulate import tabulate

from benchmarks.serving.throughput import NAME, Arm, publish, running
from models_store.manifest import Draft
from models_store.store import Store

MEMBERS = 6
PATIENCE_SECONDS = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        publish(root, MEMBERS)
        copy(Store(root), count - 1)
        arm = Arm(
            "modepath", ["bentoml", "serve", "--port", "{port}"], {"MODELS_STORE": str(root), "MODEPATH_WORKERS": "1"}
        )
        began = time.monotonic()
        with running(arm) as (url, process):
            address = url.removesuffix("/predict")
            rows = [["a new service", *until_all(address, process, count, began)]]
            os.kill(worker_of(process).pid, signal.SIGKILL)
            rows.append(["its worker replaced", *until_all(address, process, count, time.monotonic())])
    headers = [f"{count} ensembles of {MEMBERS}", "first answers, s", "all answer, s", "worker's memory, MiB"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def copy(store: Store, count: int) -> None:
    first = store.load(NAME)
    fields = {name: getattr(first.manifest, name) for name in Draft.model_fields}
    for number in range(count):
        with store.staging(f"copy-{number:03d}") as staged:
            shutil.copytree(first.folder / "members", staged / "members")
            store.publish(f"copy-{number:03d}", staged, Draft(**fields))


def until_all(address: str, process: psutil.Process, count: int, began: float) -> list[str]:
    """Seconds until any answers, seconds until all do, and the worker's memory then."""
    first = None
    while time.monotonic() - began < PATIENCE_SECONDS:
        try:
            found = len(httpx.get(address + "/ensembles").json()["ensembles"])
        except httpx.TransportError:  # not listening yet
            found = 0
        if found and first is None:
            first = time.monotonic() - began
        if found == count:
            memory = worker_of(process).memory_info().rss >> 20
            return [f"{first:.1f}", f"{time.monotonic() - began:.1f}", str(memory)]
        time.sleep(0.2)
    raise SystemExit("not all ensembles answered in time")


def worker_of(process: psutil.Process) -> psutil.Process:
    return next(child for child in process.children(recursive=True) if "--worker-id" in child.cmdline())


if __name__ == "__main__":
    main()
