"""Ten minutes at three times the capacity, with API keys, where one request of twenty is hostile.

    python -m benchmarks.faults.under_fire [--minutes 10] [--factor 3]

Clients with a key of the scope predict send known images in several forms, at random moments, whatever the service does; one key has a quota
that it exceeds. Hostile clients send bad input, bodies that stall, connections that say nothing, oversized headers, and wrong keys. Every accepted
answer is compared with the ONNX files' own; the memory is watched. The table goes to benchmarks/results/under_fire.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import aiohttp
import psutil
from tabulate import tabulate

from benchmarks.serving.overload import SIZES, Answered, ask, closed_loop, make_request
from benchmarks.serving.throughput import Arm, publish, running, until_ready
from service.access import keys
from tests.service import bad_requests

RESULT = Path(__file__).parents[1] / "results/under_fire.md"
HOSTILE = 0.05
GREEDY = 0.1  # share of the honest requests that a key with a small quota sends
QUOTA = 1200  # rows a minute
HOLD_SECONDS = 8.0  # how long a hostile connection is held open


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--factor", type=float, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, file = Path(folder) / "store", Path(folder) / "keys.json"
        members = publish(store, 12)
        secrets = {
            "steady": keys.add(file, "steady", ["predict"]),
            "greedy": keys.add(file, "greedy", ["predict"], QUOTA),
        }
        requests = [make_request(members, size, seed) for seed, size in enumerate(SIZES * 6)]
        environment = {"MODELS_STORE": str(store), "MODEPATH_KEYS_FILE": str(file)}
        arm = Arm("modepath", ["bentoml", "serve", "--port", "{port}"], environment)
        with running(arm) as (url, process):
            until_ready(url)
            text = asyncio.run(go(url, process, requests, secrets, args))
    print(text)
    if args.minutes >= 10:
        RESULT.write_text(
            f"# Under fire\n\n`python -m benchmarks.faults.under_fire --minutes {args.minutes:g} --factor {args.factor:g}`\n\n{text}\n"
        )


def keyed(request: tuple, secret: str) -> tuple:
    keywords, probs = request
    return {**keywords, "headers": {**keywords["headers"], "Authorization": f"Bearer {secret}"}}, probs


async def go(
    url: str, process: psutil.Process, requests: list, secrets: dict[str, str], args: argparse.Namespace
) -> str:
    parts = urlparse(url)
    honest = {name: [keyed(request, secret) for request in requests] for name, secret in secrets.items()}
    small, large = "steady, 1 to 4 images", "steady, 8 to 32 images"
    kinds = {
        small: [one for one in honest["steady"] if len(one[1]) <= 4], large: [one for one in honest["steady"] if len(one[1]) > 4],
        "greedy": honest["greedy"],
    }  # fmt: skip
    weights = {small: 4 / 7 * (1 - GREEDY), large: 3 / 7 * (1 - GREEDY), "greedy": GREEDY}  # as in SIZES
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as client:
        calm = Answered()
        began = time.perf_counter()
        await asyncio.gather(*(closed_loop(client, url, honest["steady"], calm, began + 10) for _ in range(16)))
        capacity = calm.rows / (time.perf_counter() - began)
        assert not calm.wrong, calm.wrong[:3]
        rate = args.factor * capacity / statistics.mean(SIZES)
        found = {name: Answered() for name in kinds}
        refusals: Counter[str] = Counter()
        memory: list[float] = []
        chance, began = random.Random(0), time.perf_counter()
        attacks = Attacks(parts.hostname, parts.port, secrets["steady"], chance)
        watcher = asyncio.ensure_future(watch(process, memory))
        tasks: set[asyncio.Task] = set()
        due, sent = began, 0
        while due < began + 60 * args.minutes:
            due += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent += 1
            if chance.random() < HOSTILE:
                work = attacks.one(refusals)
            else:
                name = chance.choices(list(weights), list(weights.values()))[0]
                work = ask(client, url, chance.choice(kinds[name]), found[name])
            task = asyncio.ensure_future(work)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
        watcher.cancel()
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return report(found, refusals, memory, capacity, rate, seconds, alive)


class Attacks:
    """Hostile requests, in turn."""

    def __init__(self, host: str, port: int, secret: str, chance: random.Random):
        self._host, self._port, self._chance = host, port, chance
        self._key = f"Authorization: Bearer {secret}\r\n".encode()  # else all would be refused before they are read
        made = bad_requests.requests(body_limit=16 * 2**20, rows_limit=1024, elsewhere="http://127.0.0.1:1/")
        self._bad = [request for request in made if len(request.request) < 2**20 and not request.stall]
        self._kinds = [self._bad_input, self._stalling, self._silent, self._oversized, self._wrong_key]
        self._turn = 0

    async def one(self, refusals: Counter[str]) -> None:
        """Send the next one, and count the status of the answer."""
        kind = self._kinds[self._turn % len(self._kinds)]
        self._turn += 1
        status = "no answer"
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(HOLD_SECONDS + 30):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                try:
                    first = await kind(reader, writer)
                    status = first.split(b" ")[1].decode() if first.startswith(b"HTTP/1.1 ") else "closed"
                finally:
                    writer.close()
        refusals[f"{kind.__name__[1:].replace('_', ' ')}: {status}"] += 1

    async def _bad_input(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        head, _, rest = self._chance.choice(self._bad).request.partition(b"\r\n")
        writer.write(head + b"\r\n" + self._key + rest)
        return await reader.readline()

    async def _stalling(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """A body of which only the beginning arrives."""
        writer.write(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n" + self._key)
        writer.write(b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{")
        return await reader.readline()

    async def _silent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """A connection that says nothing, or half of a head."""
        writer.write(self._chance.choice([b"", b"POST /predict HT"]))
        await asyncio.sleep(HOLD_SECONDS)
        return b""

    async def _oversized(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n")
        return await reader.readline()

    async def _wrong_key(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"GET /ensembles HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n\r\n")
        return await reader.readline()


async def watch(process: psutil.Process, memory: list[float]) -> None:
    while True:
        await asyncio.sleep(10)
        with contextlib.suppress(psutil.Error):
            memory.append(sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / 2**20)
            print(f"{10 * len(memory)} s: {memory[-1]:.0f} MiB", flush=True)


def report(
    found: dict[str, Answered],
    refusals: Counter[str],
    memory: list[float],
    capacity: float,
    rate: float,
    seconds: float,
    alive: bool,
) -> str:
    rows = []
    for name, answered in found.items():
        for status, count in sorted(answered.statuses.items()):
            times = sorted(answered.seconds[status])
            rows.append((name, status, count, times[len(times) // 2], times[int(0.99 * len(times))], times[-1]))
    wrong = [one for answered in found.values() for one in answered.wrong]
    images = sum(answered.rows for answered in found.values()) / seconds
    lines = [
        f"{rate:.0f} requests/s for {seconds:.0f} s, {rate * statistics.mean(SIZES) / capacity:.1f} times the capacity of {capacity:.0f} images/s; "
        f"{HOSTILE:.0%} hostile. Answered: {images:.0f} images/s, {images / capacity:.2f} of the capacity. The service {'is still alive' if alive else 'HAS DIED'}.",
        f"Wrong or broken answers: {len(wrong)} {wrong[:3] if wrong else ''}. Memory: {memory[min(5, len(memory) - 1)]:.0f} MiB after a minute, at most "
        f"{max(memory):.0f}, {memory[-1]:.0f} at the end.",
        tabulate(
            rows,
            headers=("key", "status", "requests", "median, s", "p99, s", "longest, s"),
            floatfmt=".2f",
            tablefmt="pipe",
        ),
        tabulate(sorted(refusals.items()), headers=("hostile requests", "count"), tablefmt="pipe"),
    ]
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
