"""One member, one image, one connection, for ten minutes: what the service adds to the member, and how long its tail is.

    python -m benchmarks.serving.one_connection [--seconds 600]

The member's time is the median of calls in a process that does nothing else, before and after. The table goes to
benchmarks/results/one_connection.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from tabulate import tabulate

from benchmarks.serving.servers import check, load, make_arms, requests, running
from benchmarks.serving.throughput import SHAPES, expected, publish
from models_store.graphs.runtime import MemberSession

RESULT = Path(__file__).parents[1] / "results/one_connection.md"
FORMS = ("npy", "OIP")
CALLS = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="preresnet8", choices=list(SHAPES))
    parser.add_argument("--seconds", type=int, default=600, help="for the first form; a tenth of it for the second")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = publish(folder / "store", 1, network=args.network)
        shape, classes = SHAPES[args.network]
        images = np.random.default_rng(0).integers(0, 256, (1, *shape)).astype(np.float32) / np.float32(255)
        (file,) = members.glob("*.onnx")
        for form, seconds in zip(FORMS, (args.seconds, args.seconds // 10), strict=True):
            alone = [median_ms(file, images)]
            sent = requests(images, classes)[form]
            arm = next(
                one
                for one in make_arms(folder / "store", members, shape, classes, folder)
                if one.label.startswith("modepath")
            )
            with running(arm, folder / "log") as (url, _):
                base = url.removesuffix("/predict")
                check(base, form, sent, np.stack([expected(members, images)]), arm)
                load(arm, base, form, sent, 1, 5, folder)
                cell = load(arm, base, form, sent, 1, seconds, folder)
            alone.append(median_ms(file, images))
            own = statistics.mean(alone)
            rows.append(
                [
                    form, seconds, f"{own:.2f} ({min(alone):.2f} to {max(alone):.2f})", f"{cell['p50']:.2f}", f"{cell['p50'] - own:.2f}",
                    f"{cell['p99']:.2f}", f"{cell['p99'] / cell['p50']:.2f}",
                ]
            )  # fmt: skip
    heads = ["form", "seconds", "the member, ms", "p50, ms", "added, ms", "p99, ms", "p99 ÷ p50"]
    table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    text = f"# One connection\n\n`python -m benchmarks.serving.one_connection --network {args.network} --seconds {args.seconds}`: one member, one image a request.\n\n{table}\n"
    print(text)
    RESULT.write_text(text)


def median_ms(file: Path, images: np.ndarray) -> float:
    session = MemberSession(file, "cpu", threads=1)
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        session.logits(images)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    main()
