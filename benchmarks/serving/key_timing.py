"""Does the time of a refusal reveal anything about the API keys? Permutation tests on wrong keys that resemble a right one.

    python -m benchmarks.serving.key_timing            writes results/key_timing.md; about 3 minutes on 2 cores

Groups of wrong keys: random ones, a right key but for its last character, a right key but for its first character, a revoked key. They are asked in
random order: the comparison alone, and a whole request to a service that runs here. The statistic is the difference of the mean of the faster
90 % of the times from that of the random keys.
"""

from __future__ import annotations

import argparse
import http.client
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from scipy import stats
from tabulate import tabulate

from benchmarks.serving.throughput import Arm, running
from service.access import keys
from service.access.keys import Keys

RESULT = Path(__file__).parents[1] / "results/key_timing.md"
KEYS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=5000, help="for each group")
    parser.add_argument("--requests", type=int, default=3000, help="for each group")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "keys.json"
        right = [keys.add(file, f"caller-{number}", ["predict"]) for number in range(KEYS)]
        revoked = keys.add(file, "revoked", ["predict"])
        keys.revoke(file, "revoked")
        groups: dict[str, Callable[[], str]] = {
            "random": lambda: f"mp_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}",
            "right but for the last character": lambda: (
                (one := random.choice(right))[:-1] + ("A" if one[-1] != "A" else "B")
            ),
            "right but for the first character": lambda: "n" + random.choice(right)[1:],
            "revoked": lambda: revoked,
        }
        found = Keys(file)
        rows = [
            [f"comparison, {line[0]}", *line[1:]]
            for line in table(groups, args.comparisons, lambda key: found.find(key))
        ]
        arm = Arm(
            "modepath",
            ["bentoml", "serve", "--host", "127.0.0.1", "--port", "{port}"],
            {
                "MODEPATH_PORT": "{port}",
                "MODELS_STORE": f"{place}/store",
                "MODEPATH_FEEDBACK": "off",
                "MODEPATH_KEYS_FILE": str(file),
            },
        )
        with running(arm) as (url, _):
            wait(url)
            address = urlsplit(url)
            connection = http.client.HTTPConnection(address.hostname or "", address.port)

            def ask(key: str) -> None:
                connection.request("GET", "/ensembles", headers={"Authorization": f"Bearer {key}"})
                assert connection.getresponse().read().startswith(b'{"error":"The API key')

            rows += [[f"request, {line[0]}", *line[1:]] for line in table(groups, args.requests, ask)]
    head = ["wrong keys", "median, µs", "difference from random keys, µs", "p"]
    lines = [
        "# Does the time of a refusal reveal a key?", "",
        f"`python -m benchmarks.serving.key_timing`: {KEYS} keys, {args.comparisons} comparisons and {args.requests} requests of each group in random order. "
        "p: two-sided permutation test, 2000 permutations.", "",
        tabulate(rows, head, tablefmt="github", disable_numparse=True), "",
    ]  # fmt: skip
    RESULT.write_text("\n".join(lines))
    print(RESULT.read_text())


def wait(url: str) -> None:
    """Wait until the service answers at all; its store is empty, so it never becomes ready."""
    address = urlsplit(url)
    for _ in range(300):
        try:
            connection = http.client.HTTPConnection(address.hostname or "", address.port)
            connection.request("GET", "/livez")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise TimeoutError(url)


def table(groups: dict[str, Callable[[], str]], count: int, ask: Callable[[str], object]) -> list[list[str]]:
    """Times of each group, and whether they differ from those of random keys."""
    order = [name for name in groups for _ in range(count)]
    random.shuffle(order)
    times: dict[str, list[float]] = {name: [] for name in groups}
    # Made beforehand, and cut from one buffer just before they are asked: where and when a key was made would be measured, too.
    made = [groups[name]().encode() for name in order]
    buffer, ends = b"".join(made), np.cumsum([len(one) for one in made]).tolist()
    for name, one, end in zip(order, made, ends, strict=True):
        key = buffer[end - len(one) : end].decode()
        began = time.perf_counter_ns()
        ask(key)
        times[name].append((time.perf_counter_ns() - began) / 1000)
    rows = []
    for name, own in times.items():
        test = stats.permutation_test(
            (own, times["random"]), _difference, permutation_type="independent", vectorized=True, n_resamples=2000, rng=np.random.default_rng(0)
        )  # fmt: skip
        shown = ["", ""] if name == "random" else [f"{test.statistic:+.3f}", f"{test.pvalue:.3f}"]
        rows.append([name, f"{statistics.median(own):.2f}", *shown])
    return rows


def _difference(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.subtract(
        *(np.sort(one, axis=axis)[..., : int(0.9 * one.shape[axis])].mean(axis=axis) for one in (first, second))
    )


if __name__ == "__main__":
    main()
