"""Parts of the benchmarks of the service: an ensemble to serve, a server in its own process, `wrk`, known answers, the limit without HTTP.

servers.py compares servers with them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
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

ROOT = Path(__file__).parents[2]
SHAPE, CLASSES, NAME = (1, 28, 28), 10, "twelve"
SHAPES = {"preresnet8": (SHAPE, CLASSES), "resnet50": ((3, 224, 224), 1000)}
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
    ports: dict[str, str] = field(default_factory=dict)  # of forms that have a port of their own
    cells: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)


def publish(root: Path, count: int, seed: int = 0, resize: str = "refuse", network: str = "preresnet8") -> Path:
    """An ensemble of networks with random weights; the folder of its members."""
    import torch
    import torchvision

    from models_store.manifest import Draft, InputSpec, Member, Origin
    from models_store.store import Store
    from training.members.export import Exporter, Normalised
    from training.networks import build

    shape, classes = SHAPES[network]
    store, exporter = Store(root), Exporter(InputSpec(shape=shape))
    images = np.random.default_rng(0).random((8, *shape), dtype=np.float32)
    with store.staging(NAME) as staged:
        (staged / "members").mkdir()
        members = []
        for index in range(count):
            torch.manual_seed(seed + index)
            plain = (
                torchvision.models.resnet50(num_classes=classes)
                if network == "resnet50"
                else build(network, classes, shape, {})
            )
            made = Normalised(plain.eval(), (0.286,) * shape[0], (0.353,) * shape[0])
            model, _ = exporter.export(made, images, torch.device("cpu"))
            (staged / f"members/{index:03d}.onnx").write_bytes(model)
            members.append(Member(file=f"members/{index:03d}.onnx", origin=Origin(), weight=1 / count))
        draft = Draft(
            method="import",
            input=InputSpec(shape=shape, resize=resize),
            classes=[str(i) for i in range(classes)],
            members=members,
        )
        return store.publish(NAME, Path(staged), draft).folder / "members"


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


def limit(store: Path, seconds: int) -> dict[str, float]:
    """Images a second through the same sessions, by batch size, in a process that does nothing else."""
    from models_store.graphs.runtime import EnsembleSession
    from models_store.store import Store

    version = Store(store).resolve(NAME)
    session = EnsembleSession(version.folder, version.manifest, "cpu")
    found = {}
    for batch in (1, 8, 32):
        images = np.random.default_rng(0).random((batch, *version.manifest.input.shape), dtype=np.float32)
        began = time.perf_counter()
        while time.perf_counter() - began < 1:
            session.logits(images)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            session.logits(images)
            count += batch
        found[str(batch)] = round(count / (time.perf_counter() - began), 1)
    return found
