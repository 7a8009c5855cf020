"""One random bit of a published version is flipped, a thousand times: does `verify` find it, and does a running service refuse it?

    python -m benchmarks.faults.bit_flips [--count 1000]

The version is calibrated and has a bank, so that it has every kind of file. Each flip is put into a fresh copy, the copy is activated
while a service runs, and the service must name the version as refused, and go on with the one before.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from tabulate import tabulate

from models_store.decisions.calibrating import Labelled, calibrate
from models_store.errors import StoreError
from models_store.store import Store
from tests.onnx_members import SHAPE, bank, publish
from tests.service.conftest import Server

RESULT = Path(__file__).parents[1] / "results/bit_flips.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        images = np.random.default_rng(0).random((60, *SHAPE), np.float32)
        labels = np.arange(60) % 3
        publish(store, "e", (0, 1))
        calibrate(store, publish(store, "e", (2, 3), bank=bank(points=4)), Labelled(images, labels, "noise", None))
        store.activate("e", 1)
        whole = Path(folder) / "whole"
        shutil.copytree(store.root / "e" / "3", whole)
        server = Server(store, Path(folder), MODEPATH_POLL_SECONDS="0.05")
        try:
            server.until(200)
            found, seconds = flips(store, whole, server, args.count)
        finally:
            server.stop()
    rows = [(kind, count) for kind, count in sorted(found.items())]
    table = tabulate(rows, headers=("file", "flips, each found and refused"), tablefmt="pipe")
    print(table)
    if args.count >= 1000:
        RESULT.write_text(
            "# Random bits flipped in a published version\n\n"
            f"`python -m benchmarks.faults.bit_flips --count {args.count}`: {found.total()} of {args.count} were found by `verify`, and refused by the "
            f"running service, which went on with the version before; median time to the refusal {np.median(seconds):.2f} s.\n\n{table}\n"
        )


def flips(store: Store, whole: Path, server: Server, count: int) -> tuple[Counter[str], list[float]]:
    chance = random.Random(0)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    sizes = [(whole / path).stat().st_size for path in files]
    version = store.root / "e" / "3"
    active = store.root / "e" / "active"
    image = np.zeros((1, *SHAPE)).tolist()
    found: Counter[str] = Counter()
    seconds = []
    for number in range(count):
        # Every second flip goes to a file chosen evenly, so that small files, such as the manifest, get their share.
        path = chance.choices(files, sizes if number % 2 else None)[0]
        store.activate("e", 1)
        shutil.rmtree(version)
        shutil.copytree(whole, version)
        content = bytearray((version / path).read_bytes())
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        (version / path).write_bytes(content)
        what = f"bit {bit} of {path}"
        try:
            store.verify(store.load("e", 3))
        except StoreError:
            pass
        else:
            raise AssertionError(f"{what} was not found")
        before, began = server.log.stat().st_size, time.monotonic()
        replacement = active.with_name("new")
        replacement.write_text("3\n")  # as `activate` would, which refuses a damaged manifest
        replacement.replace(active)
        while "e@3" not in (said := server.log.read_text()[before:]) and "/e/3/" not in said:
            assert time.monotonic() < began + 30, f"{what}: the service says nothing: {said}"
            time.sleep(0.02)
        seconds.append(time.monotonic() - began)
        assert "serving e@3" not in said, what
        answer = httpx.post(server.url + "/predict", json={"inputs": image})
        assert answer.status_code == 200, f"{what}: {answer.text}"
        assert answer.json()["version"] == 1, what
        found[path.parts[0]] += 1
        if number % 100 == 99:
            print(f"{number + 1} flips", flush=True)
    return found, seconds


if __name__ == "__main__":
    main()
