"""Requests a second, tail latency and CPU time of one ensemble behind HTTP: this service, two others, and the limit without HTTP.

    python -m benchmarks.serving.throughput [--members 12] [--rounds 3] [--seconds 5] [--connections 1 8 64]

Needs `wrk` (Debian has it) and the training extra (it exports preresnet8 members; speed does not depend on their weights). LitServe
is installed into .venv-peers. Every server has its own process, is asked for a known answer, warmed, and then loaded with one image
a request; rounds are interleaved, so that a slow minute of the machine hits all of them. Medians over the rounds go to
benchmarks/results/serving.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from tabulate import tabulate

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/serving.md"
SHAPE, CLASSES, NAME = (1, 28, 28), 10, "twelve"
FORMS = {"JSON": "application/json", "npy": "application/x-npy"}
READY_SECONDS = 60


@dataclass
class Arm:
    """One server: how it is started, and how its answer is read."""

    label: str
    command: list[str]
    environment: dict[str, str]
    forms: tuple[str, ...] = ("JSON", "npy")
    read: str = "ours"
    cells: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--arms", nargs="+", help="only those whose label begins so; the results file is not written")
    parser.add_argument("--limit", type=Path, help=argparse.SUPPRESS)  # the process that measures without HTTP
    args = parser.parse_args()
    if args.limit:
        print(json.dumps(limit(args.limit, args.seconds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        members = publish(store, args.members)
        arms = [arm for arm in make_arms(store, members) if not args.arms or arm.label.startswith(tuple(args.arms))]
        bodies = write_bodies(Path(folder))
        limits: list[dict[str, float]] = []
        for number in range(args.rounds):
            limits.append(measure_limit(store, args.seconds))
            print(f"round {number + 1}, without HTTP: {limits[-1]}", flush=True)
            for arm in arms:
                measure(arm, bodies, args, members)
    report = render(arms, limits, args)
    print(report)
    if not args.arms:
        RESULT.write_text(report)


def publish(root: Path, count: int, seed: int = 0, resize: str = "refuse") -> Path:
    """An ensemble of preresnet8 with random weights; the folder of its members."""
    import torch

    from models_store.manifest import Draft, InputSpec, Member, Origin
    from models_store.store import Store
    from training.members.export import Exporter, Normalised
    from training.networks import build

    store, exporter = Store(root), Exporter(InputSpec(shape=SHAPE))
    images = np.random.default_rng(0).random((8, *SHAPE), dtype=np.float32)
    with store.staging(NAME) as staged:
        (staged / "members").mkdir()
        members = []
        for index in range(count):
            torch.manual_seed(seed + index)
            network = Normalised(build("preresnet8", CLASSES, SHAPE, {}), (0.286,), (0.353,))
            model, _ = exporter.export(network, images, torch.device("cpu"))
            (staged / f"members/{index:03d}.onnx").write_bytes(model)
            members.append(Member(file=f"members/{index:03d}.onnx", origin=Origin(), weight=1 / count))
        draft = Draft(
            method="import",
            input=InputSpec(shape=SHAPE, resize=resize),
            classes=[str(i) for i in range(CLASSES)],
            members=members,
        )
        return store.publish(NAME, Path(staged), draft).folder / "members"


def make_arms(store: Path, members: Path) -> list[Arm]:
    cores = len(os.sched_getaffinity(0))
    litserve = [str(peers_python()), "-m", "benchmarks.peers.litserve_ensemble"]
    theirs = {"MEMBERS": str(members)}
    return [
        Arm("modepath", ["bentoml", "serve", "--port", "{port}"], {"MODELS_STORE": str(store)}),
        Arm(
            "BentoML as documented",
            ["bentoml", "serve", "benchmarks.peers.documented_bentoml:Ensemble", "--host", "127.0.0.1", "--port", "{port}"],
            theirs,
            forms=("JSON",),  # it reads no binary array
            read="rows",
        ),
        Arm("LitServe, its documented batching", litserve, {**theirs, "PORT": "{port}"}, read="output"),
        Arm(
            "LitServe, 10 ms and a worker a core",
            litserve,
            {**theirs, "PORT": "{port}", "BATCH_TIMEOUT": "0.01", "WORKERS": str(cores)},
            read="output",
        ),
    ]  # fmt: skip


def peers_python() -> Path:
    python = ROOT / ".venv-peers/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-peers"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "litserve", "onnxruntime", "numpy"], check=True)
    return python


def write_bodies(folder: Path, image: np.ndarray | None = None) -> dict[str, tuple[Path, np.ndarray]]:
    """The body of each form, a script that has wrk send it, and the image."""
    if image is None:
        image = np.random.default_rng(0).integers(0, 256, (1, *SHAPE)).astype(np.float32) / np.float32(255)
    array = io.BytesIO()
    np.save(array, image)
    # Six digits are what a client sends who knows what a float32 holds.
    texts = {
        "JSON": json.dumps({"inputs": np.round(image.astype(float), 6).tolist()}).encode(),
        "npy": array.getvalue(),
    }
    scripts = {}
    for form, body in texts.items():
        (folder / form).write_bytes(body)
        scripts[form] = folder / f"{form}.lua"
        scripts[form].write_text(
            f'local file = io.open("{folder / form}", "rb")\nwrk.body = file:read("*a")\nfile:close()\n'
            f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "{FORMS[form]}"\n'
        )
    return {form: (scripts[form], image) for form in texts}


def npy_script(folder: Path, name: str, images: np.ndarray, query: str = "", most: int = 500) -> Path:
    """A script for wrk that posts the images in turn, one in each request, as npy; the bodies are written into the folder."""
    count = min(most, len(images))
    for index in range(count):
        np.save(folder / f"{index}.npy", images[index : index + 1])
    script = folder / f"{name}.lua"
    script.write_text(
        f"""bodies = {{}}
for index = 0, {count - 1} do
  local file = io.open("{folder}/" .. index .. ".npy", "rb")
  bodies[index] = file:read("*a")
  file:close()
end
next_body = 0
request = function()
  next_body = (next_body + 1) % {count}
  return wrk.format("POST", "/predict{query}", {{["Content-Type"] = "application/x-npy"}}, bodies[next_body])
end
"""
    )
    return script


def free_port() -> int:
    """On which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(arm: Arm, log: Path | None = None) -> Iterator[tuple[str, psutil.Process]]:
    port = str(free_port())
    with tempfile.TemporaryDirectory() as home, (log or Path(os.devnull)).open("w") as out:
        scripts = Path(sys.executable).parent
        process = subprocess.Popen(
            [part.replace("{port}", port) for part in arm.command],
            cwd=ROOT,
            env={
                **os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "True",
                **{name: value.replace("{port}", port) for name, value in arm.environment.items()},
            },
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}/predict", psutil.Process(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # LitServe with several workers does not end by itself
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def until_ready(url: str) -> None:
    """Until the service of `running` answers.

    Raises:
        SystemExit: it does not, for a minute.
    """
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url.replace("/predict", "/readyz")).status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit("the service does not become ready")


def measure(arm: Arm, bodies: dict[str, tuple[Path, np.ndarray]], args: argparse.Namespace, members: Path) -> None:
    with running(arm) as (url, process):
        for form in arm.forms:
            script, image = bodies[form]
            check(url, script.with_suffix(""), form, arm.read, expected(members, image))
        for form in arm.forms:
            script, _ = bodies[form]
            for connections in args.connections:
                wrk(url, script, connections, 2)
                before = cpu_seconds(process)
                cell = wrk(url, script, connections, args.seconds)
                cell["cpu_ms"] = 1000 * (cpu_seconds(process) - before) / cell["requests"]
                arm.cells.setdefault((form, connections), []).append(cell)
                print(f"  {arm.label}, {form}, {connections}: {cell}", flush=True)


def check(url: str, body: Path, form: str, read: str, probs: np.ndarray) -> None:
    """Wait until it answers, and see that it answers rightly."""
    request = urllib.request.Request(url, body.read_bytes(), {"Content-Type": FORMS[form]})
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            answer = json.load(urllib.request.urlopen(request, timeout=10))
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    found = {
        "ours": lambda: answer["predictions"][0]["probs"], "rows": lambda: answer[0], "output": lambda: answer["output"],
    }[read]()  # fmt: skip
    assert np.abs(np.array(found) - probs).max() < 1e-5, f"{url} answers wrongly"


def expected(members: Path, image: np.ndarray) -> np.ndarray:
    import onnxruntime
    from scipy.special import softmax

    logits = [
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(["logits"], {"images": image})[0][0]  # pyright: ignore[reportIndexIssue]
        for file in sorted(members.glob("*.onnx"))
    ]
    return softmax(np.array(logits, np.float64), axis=1).mean(axis=0)


def wrk(url: str, script: Path, connections: int, seconds: int) -> dict[str, float]:
    text = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script, url],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if bad := re.search(r"Non-2xx.*|Socket errors.*", text):
        raise SystemExit(f"{url}: {bad[0]}")
    return parsed(text)


def parsed(text: str) -> dict[str, float]:
    """What wrk printed: requests, requests a second, and latencies in milliseconds."""

    def milliseconds(percent: str) -> float:
        value, unit = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s|m)\s*\n", text).groups()
        return float(value) * {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}[unit]

    return {
        "requests": float(re.search(r"(\d+) requests in", text)[1]),
        "rate": float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1]),
        "p50": milliseconds("50"),
        "p99": milliseconds("99"),
    }


def cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def measure_limit(store: Path, seconds: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving.throughput", "--limit", store, "--seconds", str(seconds)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def limit(store: Path, seconds: int) -> dict[str, float]:
    """Images a second through the same sessions, by batch size, in a process that does nothing else."""
    from models_store.graphs.runtime import EnsembleSession
    from models_store.store import Store

    version = Store(store).resolve(NAME)
    session = EnsembleSession(version.folder, version.manifest, "cpu")
    found = {}
    for batch in (1, 8, 32):
        images = np.random.default_rng(0).random((batch, *SHAPE), dtype=np.float32)
        for _ in range(20):
            session.logits(images)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            session.logits(images)
            count += batch
        found[str(batch)] = round(count / (time.perf_counter() - began), 1)
    return found


def render(arms: list[Arm], limits: list[dict[str, float]], args: argparse.Namespace) -> str:
    def median(arm: Arm, form: str, connections: int, what: str) -> float | None:
        cells = arm.cells.get((form, connections))
        return statistics.median(cell[what] for cell in cells) if cells else None

    without = {batch: statistics.median(one[batch] for one in limits) for batch in limits[0]}
    best = max(without.values())
    ours, rows = arms[0], []
    for form in FORMS:
        for connections in args.connections:
            for arm in arms:
                rate = median(arm, form, connections, "rate")
                if rate is None:
                    continue
                spread = [cell["rate"] for cell in arm.cells[form, connections]]
                rows.append(
                    [
                        form,
                        connections,
                        arm.label,
                        f"{rate:.0f}",
                        f"{min(spread):.0f} to {max(spread):.0f}",
                        f"{median(arm, form, connections, 'p50'):.1f}",
                        f"{median(arm, form, connections, 'p99'):.1f}",
                        f"{median(arm, form, connections, 'cpu_ms'):.2f}",
                        f"{median(ours, form, connections, 'rate') / rate:.2f}",
                        f"{rate / best:.2f}",
                    ]
                )
    heads = ["body", "connections", "server", "requests/s", "range", "p50 ms", "p99 ms", "CPU ms/request", "ours ÷ it", "of the limit"]  # fmt: skip
    notes = [
        f"# {args.members} members of preresnet8 (28 × 28, 10 classes), one image a request",
        f"`python -m benchmarks.serving.throughput --members {args.members} --rounds {args.rounds} --seconds {args.seconds}`, "
        f"{len(os.sched_getaffinity(0))} cores, shared with wrk; medians of {args.rounds} interleaved rounds.",
        "Without HTTP, images/s by batch size: " + ", ".join(f"{b}: {rate:.0f}" for b, rate in without.items())
        + f". The limit is the best of them, {best:.0f}.",
        "BentoML as documented reads no binary array: with npy compare its JSON figures.",
    ]  # fmt: skip
    return "\n\n".join([*notes, tabulate(rows, heads, tablefmt="github", disable_numparse=True)]) + "\n"


if __name__ == "__main__":
    main()
