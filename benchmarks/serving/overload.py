"""Twice as many images as the service can answer, for ten minutes: memory, refusals, and the answers to those let in.

    python -m benchmarks.serving.overload [--minutes 10] [--factor 2]

Capacity is measured first, with requests in a closed loop. Then requests of 1 to 32 images, known ones, in three forms, arrive at random
moments, whatever the service does. Every accepted answer is compared with the ONNX files' own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import numpy as np
import orjson
import psutil
from PIL import Image

from benchmarks.serving.throughput import NAME, SHAPE, Arm, check, expected, publish, running, write_bodies

SIZES = (1, 1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--factor", type=float, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        members = publish(store, 12)
        requests = [make_request(members, size, seed) for seed, size in enumerate(SIZES * 6)]
        arm = Arm("modepath", ["bentoml", "serve", "--port", "{port}"], {"MODELS_STORE": str(store)})
        script, image = write_bodies(Path(folder))["npy"]
        with running(arm) as (url, process):
            check(url, script.with_suffix(""), "npy", "ours", expected(members, image))
            asyncio.run(go(url, process, requests, args))


def make_request(members: Path, size: int, seed: int) -> tuple[dict[str, object], np.ndarray]:
    """Keyword arguments of the request, and the probabilities that are the right answer."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, *SHAPE), np.uint8)
    images = pixels.astype(np.float32) / np.float32(255)
    probs = np.stack([expected(members, image[None]) for image in images])
    form = seed % 3
    if form == 0:
        return sent(
            "application/json", json.dumps({"inputs": np.round(images.astype(float), 6).tolist()}).encode()
        ), probs
    if form == 1:
        files = [base64.b64encode(png(one[0])).decode() for one in pixels]
        return sent("application/json", json.dumps({"images": files}).encode()), probs
    array = io.BytesIO()
    np.save(array, images)
    return sent("application/x-npy", array.getvalue()), probs


def sent(media_type: str, body: bytes) -> dict[str, object]:
    return {"data": body, "headers": {"Content-Type": media_type}}


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


async def go(url: str, process: psutil.Process, requests: list, args: argparse.Namespace) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as client:
        answered = Answered()
        began = time.perf_counter()
        await asyncio.gather(*(closed_loop(client, url, requests, answered, began + 10) for _ in range(16)))
        capacity = answered.rows / (time.perf_counter() - began)
        print(f"{NAME}: capacity {capacity:.0f} images/s with 16 clients in a closed loop", flush=True)
        assert not answered.wrong, answered.wrong

        answered = Answered()
        began = time.perf_counter()
        rate = args.factor * capacity / statistics.mean(SIZES)
        watcher = asyncio.ensure_future(watch(process, answered, began, rate))
        tasks: set[asyncio.Task] = set()
        chance = random.Random(0)
        due = began
        while due < began + 60 * args.minutes:
            due += chance.expovariate(rate)
            await asyncio.sleep(max(0, due - time.perf_counter()))
            task = asyncio.ensure_future(ask(client, url, chance.choice(requests), answered))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
        watcher.cancel()
    report(answered, capacity, seconds, rate)


class Answered:
    """What came back."""

    def __init__(self) -> None:
        self.rows = 0
        self.statuses: Counter[int] = Counter()
        self.without_retry_after = 0
        self.wrong: list[str] = []
        self.seconds: dict[int, list[float]] = {}
        self.memory: list[float] = []


async def closed_loop(
    client: aiohttp.ClientSession, url: str, requests: list, answered: Answered, until: float
) -> None:
    while time.perf_counter() < until:
        await ask(client, url, random.choice(requests), answered)


async def ask(client: aiohttp.ClientSession, url: str, request: tuple, answered: Answered) -> None:
    keywords, probs = request
    began = time.perf_counter()
    try:
        async with client.post(url, **keywords) as response:
            body = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        answered.wrong.append(repr(error))
        return
    status = response.status
    answered.statuses[status] += 1
    answered.seconds.setdefault(status, []).append(time.perf_counter() - began)
    if status == 200:
        answered.rows += len(probs)
        found = np.array([row["probs"] for row in orjson.loads(body)["predictions"]])
        if found.shape != probs.shape or np.abs(found - probs).max() > 1e-5:
            answered.wrong.append("a wrong answer")
    elif status not in (429, 503) or set(orjson.loads(body)) != {"error"}:
        answered.wrong.append(body.decode())
    elif "Retry-After" not in response.headers:
        answered.without_retry_after += 1


async def watch(process: psutil.Process, answered: Answered, began: float, rate: float) -> None:
    while True:
        await asyncio.sleep(10)
        resident = sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / 2**20
        answered.memory.append(resident)
        seconds = time.perf_counter() - began
        sent = rate * seconds
        print(
            f"{seconds:5.0f} s: {sent:.0f} requests due, {resident:.0f} MiB resident, {answered.rows / seconds:.0f} images/s, {dict(answered.statuses)}",
            flush=True,
        )


def report(answered: Answered, capacity: float, seconds: float, rate: float) -> None:
    total = answered.statuses.total()
    print(f"{seconds:.0f} s at {rate:.0f} requests/s, {rate * statistics.mean(SIZES):.0f} images/s; {total} requests")
    for status, count in sorted(answered.statuses.items()):
        times = sorted(answered.seconds[status])
        print(
            f"  {status}: {count} ({count / total:.1%}), p50 {times[len(times) // 2]:.2f} s, "
            f"p99 {times[int(0.99 * len(times))]:.2f} s"
        )
    print(f"  answered {answered.rows / seconds:.0f} images/s, {answered.rows / seconds / capacity:.2f} of capacity")
    print(f"  wrong: {answered.wrong[:3] or 'none'}; refused without Retry-After: {answered.without_retry_after}")
    first = answered.memory[5] if len(answered.memory) > 5 else answered.memory[0]
    print(
        f"  memory after a minute {first:.0f} MiB, most {max(answered.memory):.0f}, at the end {answered.memory[-1]:.0f}"
    )


if __name__ == "__main__":
    main()
