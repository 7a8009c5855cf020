"""Does anything beside the answer tell which network gave it, and how much does the answer itself tell?

    python -m benchmarks.serving.side_channels NAME [--queries 4000]      NAME: a published ensemble with a bank

A service of its own, NAME under the policy {"modes": ["random", "keyed"], "point": true}, so that the truth is known here; one image a request, one connection. Of latency, body
size, headers and status in `random`: a permutation test of whether they differ between networks (F statistic, 999 permutations); as a control the same with latencies that are
longer by up to 10 % of their median, in the order of the networks' numbers. Of latency in `keyed`: whether an answer comes faster after one of the same network than after one of
another (two other images each time; Mann-Whitney, and the share of pairs in which it is faster). Then, in this process, how often the network is named by whoever knows what each
of them says of the image, from exact, 2-digit and 1-digit probabilities and from the label alone: of 100 test images the mean, and the image that tells most; ties are guessed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from scipy import stats
from tabulate import tabulate

from benchmarks.serving.throughput import Arm, running, until_ready
from models_store.store import Store
from models_store.uncertainty import softmax
from service.inference.modes import pool
from training import data
from training.config import data_options

RESULT = Path(__file__).parents[1] / "results/side_channels.md"
WARM, IMAGES, OF_PAIRS = 300, 100, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--queries", type=int, default=4000)
    args = parser.parse_args()
    version = Store().resolve(args.name)
    splits = data.load(data_options(version.manifest.provenance.config))
    images, _ = data.as_arrays(splits.test)
    points, channels, successive = ask(args.name, images, args.queries)
    numbers = points / points.max() * np.median(channels["latency"]) / 10
    channels["latency, lengthened (control)"] = channels["latency"] + numbers
    rows = []
    for channel, values in channels.items():
        values = stats.rankdata(values)
        p = stats.permutation_test(
            (values,), lambda v: between(v, points), permutation_type="pairings", n_resamples=999, alternative="greater",
            rng=np.random.default_rng(0),
        ).pvalue if len(set(values.tolist())) > 1 else 1.0  # fmt: skip
        rows.append([channel, len(set(values.tolist())), f"{p:.3f}"])
    same, other = successive
    compared = stats.mannwhitneyu(same, other)
    faster = 1 - compared.statistic / len(same) / len(other)
    after = (
        f"`keyed`, {len(same)} answers after one of the same network and {len(other)} after one of another: medians {1e6 * np.median(same):.0f} and {1e6 * np.median(other):.0f} µs; faster "
        f"after the same in {100 * faster:.1f} % of pairs (50 tells nothing), p {compared.pvalue:.2g}."
    )
    found = pool.source(version, "cpu")
    answers = answers_of(found, images[:IMAGES])
    told = [
        [shown, f"{100 * named(answers, digits).mean():.1f}", f"{100 * named(answers, digits).max():.0f}"]
        for shown, digits in (("exact", 12), ("2 digits", 2), ("1 digit", 1), ("label", None))
    ]
    text = [
        "# What tells the network",
        f"`python -m benchmarks.serving.side_channels {args.name} --queries {args.queries}`, {len(os.sched_getaffinity(0))} cores; {found.count} networks, chance {100 / found.count:.1f} %.",
        tabulate(rows, ["beside the answer", "different values", "p"], tablefmt="github", disable_numparse=True),
        after,
        tabulate(
            told,
            ["the answer", "network named, %", "of the image that tells most"],
            tablefmt="github",
            disable_numparse=True,
        ),
    ]
    RESULT.write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


def ask(
    name: str, images: NDArray[np.float32], queries: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The networks that answered in `random`, and what else could be seen of each answer; latencies in `keyed` after the same network and after another."""
    policy = json.dumps({name: {"modes": ["random", "keyed"], "point": True}})
    environment = {"MODEPATH_POLICIES": policy, "MODEPATH_DEFAULT": name, "MODEPATH_KEY_SECONDS": "1e9"}
    body = body_of(images[0], "random")
    points, seconds, sizes, headers, status = [], [], [], [], []
    with (
        running(Arm("modepath", ["bentoml", "serve", "--port", "{port}"], environment)) as (url, _),
        httpx.Client() as client,
    ):
        until_ready(url)
        for _ in range(WARM + queries):
            began = time.perf_counter()
            answer = client.post(url, content=body, headers={"Content-Type": "application/json"})
            seconds.append(time.perf_counter() - began)
            points.append(answer.json()["predictions"][0]["point"])
            sizes.append(len(answer.content))
            headers.append(hash(tuple((k, v) for k, v in answer.headers.items() if k != "date")))
            status.append(answer.status_code)
        successive = one_after_another(client, url, images[:OF_PAIRS], queries)
    seen = {
        "latency": seconds[WARM:],
        "body size": sizes[WARM:],
        "headers": headers[WARM:],
        "status": status[WARM:],
    }
    return np.array(points[WARM:]), {name: np.array(values, float) for name, values in seen.items()}, successive


def body_of(image: NDArray[np.float32], mode: str) -> bytes:
    return json.dumps({"inputs": image[None].tolist(), "mode": mode}).encode()


def one_after_another(
    client: httpx.Client, url: str, images: NDArray[np.float32], queries: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds of a `keyed` answer after one of the same network, and after one of another, in turn; always of two different images."""
    bodies = [body_of(image, "keyed") for image in images]

    def asked(number: int) -> tuple[int, float]:
        began = time.perf_counter()
        answer = client.post(url, content=bodies[number], headers={"Content-Type": "application/json"})
        seconds = time.perf_counter() - began
        return answer.json()["predictions"][0]["point"], seconds

    of = np.array([asked(number)[0] for number in range(len(bodies))])
    alike = [pair for pair in itertools.combinations(range(len(of)), 2) if of[pair[0]] == of[pair[1]]]
    apart = [pair for pair in itertools.combinations(range(len(of)), 2) if of[pair[0]] != of[pair[1]]]
    rng, found = np.random.default_rng(0), ([], [])
    for _ in range(queries // 2):
        # Three others in between, so that every pair begins alike.
        for kind, pairs in zip(found, (alike, apart), strict=True):
            for number in rng.integers(len(bodies), size=3):
                asked(int(number))
            first, second = pairs[rng.integers(len(pairs))]
            asked(first)
            kind.append(asked(second)[1])
    return np.array(found[0]), np.array(found[1])


def between(values: NDArray[np.float64], points: NDArray[np.int64]) -> float:
    """How far the networks' means lie apart: the F statistic but for what permutations leave alone."""
    counts = np.bincount(points)
    sums = np.bincount(points, values)
    return float((sums[counts > 0] ** 2 / counts[counts > 0]).sum())


def answers_of(source: pool.Source, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """(networks, images, classes)."""
    networks = (source.open(number) for number in range(source.count))
    return np.stack([softmax(network.session.logits(images), network.temperature) for network in networks])


def named(answers: NDArray[np.float64], digits: int | None) -> NDArray[np.float64]:
    """Of each image, the share of answers whose network is named by whoever knows them all: one over how many say the same."""
    shown = answers.argmax(2)[..., None] if digits is None else answers.round(digits)
    return np.array([len(np.unique(shown[:, image], axis=0)) / len(shown) for image in range(shown.shape[1])])


if __name__ == "__main__":
    main()
