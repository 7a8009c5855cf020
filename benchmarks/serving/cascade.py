"""The mode `cascade` against `average` over HTTP, in one run: requests a second, agreement of labels, members used.

    python -m benchmarks.serving.cascade NAME [--rounds 5] [--seconds 5] [--connections 8 64] [--workers 1 2]

NAME is a published, calibrated ensemble; its test split gives the images, one in each request, npy bodies, a thousand different images in
turn. Both modes are measured in each round, on the same server; ratios are within a round. Agreement is over the whole test split.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from tabulate import tabulate

from benchmarks.serving.throughput import Arm, cpu_seconds, npy_script, running, until_ready, wrk
from models_store.decisions.calibrating import from_npz
from models_store.store import Store
from service.client import Client
from training import data
from training.config import data_options

RESULT = Path(__file__).parents[1] / "results/cascade.md"
BODIES = 1000  # at most
MODES = {"average": {}, "calibrated": {"mode": "cascade"}, "exact": {"mode": "cascade", "rule": "exact"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--images", type=Path, help="npz file with x and y, for versions that name no data set")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    version = Store().load(args.name)
    if args.images is None:
        images, labels = data.as_arrays(data.load(data_options(version.manifest.provenance.config)).test)
    else:
        given = from_npz(args.images)
        images, labels = given.images, given.labels
    rows = []
    for workers in args.workers:
        rates, tails, spent, agreement = _measured(args, workers, images, labels)
        for mode in MODES:
            for connections in args.connections:
                ratio = np.array(rates[mode, connections]) / np.array(rates["average", connections])
                rows.append(
                    [workers, mode, connections, f"{np.median(rates[mode, connections]):.0f}",
                     f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})", f"{np.median(tails[mode, connections]):.1f}", f"{np.median(spent[mode, connections]):.2f}", *agreement[mode]]
                )  # fmt: skip
    headers = [
        "workers",
        "mode",
        "connections",
        "requests/s",
        "ratio to average",
        "p99, ms",
        "CPU, ms per request",
        "members used",
        "labels as by average",
        "accuracy",
    ]
    command = f"python -m benchmarks.serving.cascade {args.name} --rounds {args.rounds} --seconds {args.seconds}"
    text = "\n".join(
        [
            "# Cascade against average over HTTP", "",
            f"`{command}`, {len(os.sched_getaffinity(0))} cores shared with wrk; {len(version.manifest.members)} members, {len(images)} test images; "
            f"one image in each request, npy. Medians over rounds.", "",
            tabulate(rows, headers, tablefmt="github", disable_numparse=True), "",
        ]
    )  # fmt: skip
    args.output.write_text(text)
    print(text)


Cells = dict[tuple[str, int], list[float]]


def _measured(
    args: argparse.Namespace, workers: int, images: np.ndarray, labels: np.ndarray
) -> tuple[Cells, Cells, Cells, dict[str, list[str]]]:
    """Requests a second, p99 and CPU milliseconds per request by mode and connections, and what `_agreement` finds, of one server."""
    policies = {args.name: {"modes": ["average", "cascade"]}}
    arm = Arm(
        "modepath",
        ["bentoml", "serve", "--host", "127.0.0.1", "--port", "{port}"],
        {
            "MODEPATH_PORT": "{port}", "MODEPATH_POLICIES": json.dumps(policies), "MODEPATH_DEFAULT": args.name,
            "MODEPATH_WORKERS": str(workers), "MODEPATH_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers)),
        },
    )  # fmt: skip
    rates, tails, spent = Cells(), Cells(), Cells()
    with tempfile.TemporaryDirectory() as folder, running(arm) as (url, process):
        until_ready(url)
        with Client(url.removesuffix("/predict"), timeout=120) as client:
            agreement = _agreement(client, images, labels)
        scripts = {
            mode: npy_script(Path(folder), mode, images, "?" + "&".join(f"{k}={v}" for k, v in options.items()), BODIES)
            for mode, options in MODES.items()
        }
        for _ in range(args.rounds):
            for connections in args.connections:
                for mode in MODES:
                    before = cpu_seconds(process)
                    measured = wrk(url, scripts[mode], connections, args.seconds)
                    spent.setdefault((mode, connections), []).append(
                        1000 * (cpu_seconds(process) - before) / measured["requests"]
                    )
                    rates.setdefault((mode, connections), []).append(measured["rate"])
                    tails.setdefault((mode, connections), []).append(measured["p99"])
    return rates, tails, spent, agreement


def _agreement(client: Client, images: np.ndarray, labels: np.ndarray) -> dict[str, list[str]]:
    """Members used, share of labels as by `average`, and accuracy, of each mode."""
    size = max(1, min(500, 2**21 // images[0].size))  # bodies of at most 8 MiB
    answers = {
        mode: [client.predict(images[i : i + size], **options) for i in range(0, len(images), size)]
        for mode, options in MODES.items()
    }
    named = {mode: np.concatenate([one.labels for one in parts]) for mode, parts in answers.items()}
    found = {}
    for mode, parts in answers.items():
        if mode == "average":
            used = float(parts[0].members_used)
        else:
            used = sum(float(one.members_used_by_row.sum()) for one in parts) / len(labels)
        found[mode] = [
            f"{used:.2f}",
            f"{(named[mode] == named['average']).mean():.4f}",
            f"{(named[mode] == labels).mean():.4f}",
        ]
    return found


if __name__ == "__main__":
    main()
