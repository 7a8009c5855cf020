"""Memory of K large members in one process, as a multiple of the size of their files.

    python -m benchmarks.serving.member_memory [--network resnet50] [--members 5]

Each cell is a process of its own: private memory before the members are opened, after that, and after three batches. The table goes to
benchmarks/results/member_memory.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from tabulate import tabulate

from benchmarks.serving.throughput import SHAPES, publish
from models_store.graphs.runtime import EnsembleSession
from models_store.manifest import Manifest

RESULT = Path(__file__).parents[1] / "results/member_memory.md"
ROWS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # folder and rows: measure in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(Path(args.one[0]), int(args.one[1]), SHAPES[args.network][0])))
        return
    lines = []
    for members in args.members:
        with tempfile.TemporaryDirectory() as folder:
            version = publish(Path(folder) / "store", members, network=args.network).parent
            for rows in ROWS:
                command = [sys.executable, "-m", "benchmarks.serving.member_memory", "--network", args.network]
                done = subprocess.run(
                    [*command, "--one", version, str(rows)], capture_output=True, text=True, check=True
                )
                weights, opened, ran = json.loads(done.stdout.splitlines()[-1])
                lines.append(
                    [members, rows, f"{weights / 2**20:.0f}", f"{opened / weights:.2f}", f"{ran / weights:.2f}"]
                )
    heads = ["members", "rows of a batch", "weights, MiB", "opened, times the weights", "after three batches, times the weights"]  # fmt: skip
    table = tabulate(lines, heads, tablefmt="github", disable_numparse=True)
    text = f"# Memory of large members\n\n`python -m benchmarks.serving.member_memory --network {args.network}`, two threads.\n\n{table}\n"
    print(text)
    RESULT.write_text(text)


def measured(folder: Path, rows: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    manifest = Manifest.parse((folder / "manifest.json").read_bytes(), "the manifest")
    weights = sum((folder / member.file).stat().st_size for member in manifest.members)
    before = private()
    session = EnsembleSession(folder, manifest, "cpu", 2)
    opened = private() - before
    images = np.random.default_rng(0).random((rows, *shape), np.float32)
    for _ in range(3):
        session.run(images)
    return weights, opened, private() - before


def private() -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # as the service does after loading
    return psutil.Process().memory_full_info().uss


if __name__ == "__main__":
    main()
