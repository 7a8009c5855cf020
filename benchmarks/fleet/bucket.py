"""A store in a bucket (moto's server of Amazon S3's protocol, on this machine), its publishers and three replicas of a service.

    python -m benchmarks.fleet.bucket [--activations 10] [--away 60]

1. Twenty processes publish under one name at the same moment.
2. A thousand ensembles of ten versions are listed by a new process: requests.
3. Three replicas, each with a cache of its own, answer without a pause; each answer is compared with the version that it names. A version is
   activated several times: seconds until each replica answers with it. Then the bucket answers nothing for a minute.

The table goes to benchmarks/results/bucket.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tabulate import tabulate

from models_store.remote.objects import Objects
from models_store.store import Store
from tests.buckets import Buckets, serving
from tests.onnx_members import publish
from tests.service.conftest import Server
from tests.service.test_bucket import SEEDS, Asker

RESULT = Path(__file__).parents[1] / "results/bucket.md"
PUBLISHERS, ENSEMBLES, VERSIONS, REPLICAS = 20, 1000, 10, 3
PUBLISH = "from models_store.store import Store; from tests.onnx_members import publish; import sys; sys.stdin.read(); publish(Store(), 'many')"
LIST = "from models_store.store import Store; s = Store(); print(sum(len(s.versions(n)) for n in s.names()), len(s.activation_order()))"


def until(askers: list[Asker], version: int, seconds: float = 60) -> None:
    """Wait until the last answer to each of them came from this version."""
    deadline = time.monotonic() + seconds
    while any(not asker.seen or asker.seen[-1][1] != version for asker in askers):
        if time.monotonic() > deadline:
            sys.exit(f"after {seconds:.0f} s not all replicas answer with version {version}")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--activations", type=int, default=10)
    parser.add_argument("--away", type=float, default=60, help="seconds for which the bucket answers nothing")
    args = parser.parse_args()
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(folder) as buckets:
            os.environ.update(buckets.environment(folder / "cache"))
            rows += [publishers(buckets), listing(buckets)]
            rows += replicas(buckets, folder, args.activations, args.away)
    table = tabulate(rows, ["what", "outcome"], tablefmt="github", disable_numparse=True)
    command = f"python -m benchmarks.fleet.bucket --activations {args.activations} --away {args.away:g}"
    print(table)
    RESULT.write_text(f"# A store in a bucket\n\n`{command}`\n\n{table}\n")


def publishers(buckets: Buckets) -> tuple[str, str]:
    address = f"s3://{buckets.make()}/models"
    environment = {**os.environ, "MODELS_STORE": address}
    running = [
        subprocess.Popen([sys.executable, "-c", PUBLISH], stdin=subprocess.PIPE, env=environment)
        for _ in range(PUBLISHERS)
    ]
    time.sleep(20)  # until all have started
    for one in running:
        one.stdin.close()
    failed = sum(one.wait() != 0 for one in running)
    store = Store(Path(address))
    for number in store.versions("many"):
        store.verify(store.load("many", number))
    return (
        f"{PUBLISHERS} processes publish at once",
        f"{len(store.versions('many'))} versions, each verified, {failed} failed; active: {store.active('many')}",
    )


def listing(buckets: Buckets) -> tuple[str, str]:
    address = f"s3://{buckets.make()}/models"
    bucket = Objects(address)
    with ThreadPoolExecutor(16) as threads:
        for _ in threads.map(
            lambda i: bucket.put(f"manifests/e{i // VERSIONS}/{i % VERSIONS + 1}.json", b"{}"),
            range(ENSEMBLES * VERSIONS),
        ):
            pass
    before, began = len(buckets.requests), time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", LIST], env={**os.environ, "MODELS_STORE": address}, capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip
    spent = time.perf_counter() - began
    return (
        f"{ENSEMBLES} ensembles of {VERSIONS} versions are listed by a new process",
        f"{found[0]} versions, {len(buckets.requests) - before} requests, {spent:.1f} s with the start of Python",
    )


def replicas(buckets: Buckets, folder: Path, activations: int, away: float) -> list[tuple[str, str]]:
    store = Store(Path(f"s3://{buckets.make()}/models"))
    for seeds in SEEDS.values():
        publish(store, "e", seeds)
    servers = [
        Server(store, folder, MODEPATH_WORKERS="1", MODEPATH_POLL_SECONDS="1", MODEPATH_CACHE=str(folder / f"cache-{i}"))
        for i in range(REPLICAS)
    ]  # fmt: skip
    try:
        for one in servers:
            one.until(200, seconds=120)
        askers = [Asker(one.url) for one in servers]
        time.sleep(2)
        times: list[float] = []
        for number in range(activations):
            version = number % 2 + 1
            began = time.monotonic()
            store.activate("e", version)
            until(askers, version)
            for asker in askers:
                first = next(at for at, seen in asker.seen if at > began and seen == version)
                times.append(first - began)
            time.sleep(1)
        during, wrong = sum(len(asker.seen) for asker in askers), sum(len(asker.wrong) for asker in askers)
        with buckets.unreachable():
            time.sleep(away)
        answered = sum(len(asker.seen) for asker in askers) - during
        version = 2 - activations % 2 if activations else 1
        other = 3 - version
        began = time.monotonic()
        store.activate("e", other)
        until(askers, other)
        back = time.monotonic() - began
        for asker in askers:
            asker.stop()
        wrong_away = sum(len(asker.wrong) for asker in askers) - wrong
    finally:
        for one in servers:
            one.stop()
    return [
        (
            f"{activations} activations under load, {REPLICAS} replicas (MODEPATH_POLL_SECONDS=1)",
            f"each replica answered with the new version within {max(times):.2f} s (median {sorted(times)[len(times) // 2]:.2f} s); {during} answers, {wrong} failed or mixed",
        ),
        (
            f"the bucket answers nothing for {away:g} s",
            f"{answered} answers meanwhile, {wrong_away} failed; an activation right after it reached all within {back:.2f} s",
        ),
    ]


if __name__ == "__main__":
    main()
