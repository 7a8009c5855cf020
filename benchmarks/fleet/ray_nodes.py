"""Eight independent networks on a Ray cluster of three nodes, beside the same training without Ray; and with a node that is killed.

    sudo python -m benchmarks.fleet.ray_nodes [--epochs 10]

Nodes are network namespaces of this machine (deploy/ray_cluster.py) with one CPU each; both trainings use one thread for a network. The table goes to
benchmarks/results/ray_nodes.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from deploy import ray_cluster
from models_store.store import Store

RESULT = Path(__file__).parents[1] / "results/ray_nodes.md"
ROOT = Path(__file__).parents[2]
NODES, RUNS = 3, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rows, expected = [], []
    with tempfile.TemporaryDirectory() as name:
        for what, node in (
            ("without Ray", None),
            (f"{NODES} nodes", 0),
            (f"{NODES} nodes, one killed in the middle", 2),
        ):
            if node is not None:
                ray_cluster.up(NODES, 1)
            try:
                seconds, trained, hashes, resumed = trained_once(Path(name) / str(len(rows)), args.epochs, node)
            finally:
                ray_cluster.down()
            expected = expected or hashes
            same = sum(one == other for one, other in zip(hashes, expected, strict=True))
            base = rows[0][1] if rows else seconds
            ideal = base if node is None else base / min(cores, NODES)
            rows.append([what, seconds, trained, ideal, seconds / ideal, f"{same} of {RUNS}", resumed])
    heads = ["training", "seconds", "of these in training, summed over tasks", "ideal seconds", "ratio", "members equal, by sha256", "tasks that resumed"]  # fmt: skip
    table = tabulate(rows, heads, tablefmt="github", floatfmt=".2f")
    command = f"python -m benchmarks.fleet.ray_nodes --epochs {args.epochs}"
    print(table)
    RESULT.write_text(
        f"# Independent networks on a Ray cluster\n\n`{command}`, {cores} cores: {NODES} nodes of one CPU share them, so that the ideal is the time without Ray divided by {min(cores, NODES)}.\n\n{table}\n"
    )


def trained_once(folder: Path, epochs: int, node: int | None) -> tuple[float, float, list[str], int]:
    """Train; node: None: without Ray; 0: on the cluster; else the node that is killed after half of the epochs of its first network."""
    folder.mkdir()
    options = ["--dataset", "digits", "--network", "preresnet8", "--epochs", str(epochs), "--runs", str(RUNS), "--batch-size", "64", "--name", "e"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **ray_cluster.AUTHENTICATED, "MODELS_STORE": str(folder / "store"), "MODEPATH_RUNS": str(folder / "runs")}  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "training.independent", *options, *(["--ray", ray_cluster.HEAD] if node is not None else [])],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output = []
    assert process.stdout is not None, "it is a pipe"
    for line in process.stdout:
        print(line, end="", flush=True)
        output.append(line)
        if node and f"epoch {epochs // 2}/{epochs}" in line and f"{ray_cluster.NET}.{10 + node}" in line:
            ray_cluster.kill(node)
            node = 0
    if process.wait():
        sys.exit("the training failed")
    version = Store(folder / "store").load("e")
    hashes = [hashlib.sha256((version.folder / one.file).read_bytes()).hexdigest() for one in version.manifest.members]
    trained = version.manifest.provenance.wall_seconds or 0.0
    return time.monotonic() - began, trained, hashes, sum("resuming" in line for line in output)


if __name__ == "__main__":
    main()
