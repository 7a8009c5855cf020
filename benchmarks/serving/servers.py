"""Requests a second, tail latency, CPU time and memory of one ensemble: this service, its peers, and the limit without a server.

    python -m benchmarks.serving.servers [--network preresnet8] [--members 12] [--batch 1] [--rounds 3] [--seconds 5] [--connections 1 8 64]

Needs `wrk` and `h2load` (Debian: wrk, nghttp2-client) and the training extra (it exports members; speed does not depend on their
weights). LitServe is installed into .venv-peers; MLServer and Triton take part where `make .venv-mlserver/.installed
.venv-triton/.installed` has installed them. Every server has its own process, is asked for a known answer, warmed, and then loaded; the
load generator has a fixed core. Rounds are interleaved, so that a slow minute of the machine hits all servers. Every cell is added to
benchmarks/results/serving.jsonl as it is measured; medians and ranges go to benchmarks/results/serving.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tabulate import tabulate

from benchmarks.serving.throughput import (
    NAME,
    ROOT,
    SHAPES,
    Arm,
    cpu_seconds,
    expected,
    free_port,
    limit,
    parsed,
    publish,
    running,
)
from service.oip.grpc_messages import InferRequest, InferResponse

CELLS, TABLE = ROOT / "benchmarks/results/serving.jsonl", ROOT / "benchmarks/results/serving.md"
LENGTH = "Inference-Header-Content-Length"  # of the Open Inference Protocol with binary data
METHOD = "/inference.GRPCInferenceService/ModelInfer"
READY_SECONDS = 120
WARM_SECONDS = 2
BACKGROUND = {
    "JSON": "application/json",
    "npy": "application/x-npy",
    "OIP": "application/octet-stream",
    "OIP JSON": "application/json",
}
FORMS = [*BACKGROUND, "npy, random", "gRPC"]


@dataclass(frozen=True)
class Sent:
    """One form of a request."""

    path: str
    body: bytes
    headers: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="preresnet8", choices=list(SHAPES))
    parser.add_argument("--members", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--arms", nargs="+", help="only those whose label begins so; nothing is written")
    parser.add_argument("--limit", type=Path, help=argparse.SUPPRESS)  # the process that measures without a server
    parser.add_argument("--render", action="store_true", help="only write the table from the cells")
    args = parser.parse_args()
    if args.limit:
        print(json.dumps(limit(args.limit, args.seconds)))
        return
    if not args.render:
        with tempfile.TemporaryDirectory() as folder:
            measure_all(Path(folder), args)
    if not args.arms:
        TABLE.write_text(render([json.loads(line) for line in CELLS.read_text().splitlines()]))
        print(TABLE.read_text())


def measure_all(folder: Path, args: argparse.Namespace) -> None:
    store = folder / "store"
    members = publish(store, args.members, network=args.network)
    shape, classes = SHAPES[args.network]
    images = np.random.default_rng(0).integers(0, 256, (args.batch, *shape)).astype(np.float32) / np.float32(255)
    right = np.stack([expected(members, image[None]) for image in images])
    forms = requests(images, classes)
    arms = [
        one
        for one in make_arms(store, members, shape, classes, folder)
        if not args.arms or one.label.startswith(tuple(args.arms))
    ]
    run = time.strftime("%Y-%m-%d %H:%M")
    for number in range(args.rounds):
        record = {"run": run, "network": args.network, "members": args.members, "batch": args.batch, "round": number}
        keep({**record, "server": "without a server", **measure_limit(store, args.seconds)}, args)
        for arm in arms:
            with running(arm, folder / "log") as (url, process):
                base = url.removesuffix("/predict")
                for form in arm.forms:
                    check(base, form, forms[form], right, arm)
                for form in arm.forms:
                    for connections in args.connections:
                        load(arm, base, form, forms[form], connections, WARM_SECONDS, folder)
                        before = cpu_seconds(process)
                        cell = load(arm, base, form, forms[form], connections, args.seconds, folder)
                        cell["cpu_ms"] = 1000 * (cpu_seconds(process) - before) / cell["requests"]
                        cell["memory"] = memory(process)
                        keep({**record, "server": arm.label, "form": form, "connections": connections, **cell}, args)


def keep(record: dict[str, object], args: argparse.Namespace) -> None:
    print({name: round(value, 2) if isinstance(value, float) else value for name, value in record.items()}, flush=True)
    if not args.arms:
        with CELLS.open("a") as file:
            file.write(json.dumps(record) + "\n")


def requests(images: np.ndarray, classes: int) -> dict[str, Sent]:
    """The images in each form."""
    array = io.BytesIO()
    np.save(array, images)
    # Six digits are what a client sends who knows what a float32 holds.
    listed = np.round(images.astype(float), 6)
    path = f"/v2/models/{NAME}/infer"
    tensor = {"name": "input", "datatype": "FP32", "shape": images.shape}
    binary = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": images.nbytes}}],
        "outputs": [{"name": "probs", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(binary).encode()
    message = InferRequest(model_name=NAME, raw_input_contents=[images.tobytes()])
    message.inputs.add(**tensor)
    message.outputs.add(name="probs")
    return {
        "JSON": Sent("/predict", json.dumps({"inputs": listed.tolist()}).encode(), {}),
        "npy": Sent("/predict", array.getvalue(), {}),
        "npy, random": Sent("/predict?mode=random", array.getvalue(), {"Content-Type": BACKGROUND["npy"]}),
        "OIP": Sent(path, head + images.tobytes(), {LENGTH: str(len(head))}),
        "OIP JSON": Sent(path, json.dumps({"inputs": [{**tensor, "data": listed.ravel().tolist()}]}).encode(), {}),
        "gRPC": Sent(METHOD, message.SerializeToString(), {}),
    }


def make_arms(store: Path, members: Path, shape: tuple[int, ...], classes: int, folder: Path) -> list[Arm]:
    cores = len(os.sched_getaffinity(0))
    theirs = {
        "MEMBERS": str(members),
        "NAME": NAME,
        "SHAPE": ",".join(map(str, shape)),
        "CLASSES": str(classes),
        "PYTHONPATH": str(ROOT),
    }
    litserve = [str(peers_python()), "-m", "benchmarks.peers.litserve_ensemble"]
    grpc = str(free_port())
    policies = json.dumps({NAME: {"modes": ["average", "random"], "probabilities": "exact"}})
    arms = [
        Arm(
            "modepath", ["bentoml", "serve", "--port", "{port}"],
            {"MODELS_STORE": str(store), "MODEPATH_GRPC_PORT": grpc, "MODEPATH_POLICIES": policies}, tuple(FORMS), ports={"gRPC": grpc},
        ),
        Arm(
            "uvicorn, in an hour",
            [sys.executable, "-m", "uvicorn", "benchmarks.peers.uvicorn_ensemble:app", "--port", "{port}", "--no-access-log"], theirs,
        ),
        Arm(
            "BentoML as documented",
            ["bentoml", "serve", "benchmarks.peers.documented_bentoml:Ensemble", "--host", "127.0.0.1", "--port", "{port}"],
            theirs, ("JSON",),
        ),
        Arm("LitServe, 10 ms and a worker a core", litserve, {**theirs, "PORT": "{port}", "BATCH_TIMEOUT": "0.01", "WORKERS": str(cores)}),
    ]  # fmt: skip
    their_grpc = str(free_port())
    if (mlserver := ROOT / ".venv-mlserver/bin/python").exists():
        command = [
            str(mlserver),
            "-m",
            "benchmarks.peers.mlserver_ensemble",
            str(folder / "mlserver"),
            "{port}",
            their_grpc,
            NAME,
        ]
        arms.append(Arm("MLServer", command, theirs, ("OIP JSON", "gRPC"), ports={"gRPC": their_grpc}))
    if (triton := ROOT / ".venv-triton/bin/python").exists():
        command = [str(triton), "-m", "benchmarks.peers.triton_ensemble"]
        ports = {"PORT": "{port}", "GRPC_PORT": their_grpc}
        arms.append(
            Arm("Triton", command, {**theirs, **ports}, ("OIP", "OIP JSON", "gRPC"), ports={"gRPC": their_grpc})
        )
    return arms


def peers_python() -> Path:
    python = ROOT / ".venv-peers/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-peers"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "litserve", "onnxruntime", "numpy"], check=True)
    return python


def check(base: str, form: str, sent: Sent, right: np.ndarray, arm: Arm) -> None:
    """Wait until it answers, and see that it answers rightly."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            found = answer(base, form, sent, arm)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    if form != "npy, random":  # its answer is one member's
        assert np.abs(np.array(found).reshape(right.shape) - right).max() < 1e-4, f"{arm.label} answers {form} wrongly"


def answer(base: str, form: str, sent: Sent, arm: Arm) -> object:
    """The probabilities that a server answers."""
    if form == "gRPC":
        import grpc

        with grpc.insecure_channel(f"127.0.0.1:{arm.ports[form]}") as channel:
            try:
                reply = channel.unary_unary(METHOD)(sent.body, timeout=60)
            except grpc.RpcError as error:
                raise OSError(str(error)) from None
        response = InferResponse.FromString(reply)
        number = next(i for i, one in enumerate(response.outputs) if one.name == "probs")
        if response.raw_output_contents:
            return np.frombuffer(response.raw_output_contents[number], np.float32)
        contents = response.outputs[number].contents  # MLServer answers in float64
        return list(contents.fp32_contents) or list(contents.fp64_contents)
    headers = {"Content-Type": BACKGROUND.get(form, ""), **sent.headers}
    with urllib.request.urlopen(urllib.request.Request(base + sent.path, sent.body, headers), timeout=60) as reply:
        body, length = reply.read(), reply.headers.get(LENGTH)
    record = json.loads(body[: int(length)] if length else body)
    if form == "OIP":
        return np.frombuffer(body[int(length) :], np.float32)
    if form == "OIP JSON":
        return next(one["data"] for one in record["outputs"] if one["name"] == "probs")
    if isinstance(record, list):
        return record
    if "predictions" in record:
        return [row.get("probs") for row in record["predictions"]]
    return record.get("probs", record.get("output"))


def load(arm: Arm, base: str, form: str, sent: Sent, connections: int, seconds: int, folder: Path) -> dict[str, float]:
    """Load a server for some seconds. The load generator has the last core to run on, which the server may use as well."""
    pinned = ["taskset", "-c", str(max(os.sched_getaffinity(0)))]
    body = folder / "body"
    if form == "gRPC":
        body.write_bytes(b"\0" + len(sent.body).to_bytes(4, "big") + sent.body)
        log = folder / "h2load.log"
        log.unlink(missing_ok=True)
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        command = [
            *pinned,
            "h2load",
            "-t1",
            f"-c{connections}",
            "-m1",
            f"-D{seconds}",
            f"--log-file={log}",
            "-d",
            str(body),
            *headers,
        ]
        text = subprocess.run(
            [*command, f"http://127.0.0.1:{arm.ports[form]}{METHOD}"], capture_output=True, text=True, check=True
        ).stdout
        times = (
            np.array([int(line.split()[2]) for line in log.read_text().splitlines() if line.split()[1] == "200"]) / 1000
        )
        if re.search(r" (\d+) failed", text)[1] != "0" or not len(times):
            raise SystemExit(f"{arm.label}, {form}: {text}")
        return {
            "requests": float(len(times)),
            "rate": len(times) / seconds,
            "p50": float(np.median(times)),
            "p99": float(np.percentile(times, 99)),
        }
    body.write_bytes(sent.body)
    script = folder / "script.lua"
    headers = {"Content-Type": BACKGROUND.get(form, ""), **sent.headers}
    script.write_text(
        f'local file = io.open("{body}", "rb")\nwrk.body = file:read("*a")\nfile:close()\nwrk.method = "POST"\n'
        + "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in headers.items())
    )
    command = [
        *pinned,
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        "60s",
        "--latency",
        "-s",
        str(script),
    ]
    text = subprocess.run([*command, base + sent.path], capture_output=True, text=True, check=True).stdout
    if bad := re.search(r"Non-2xx.*|Socket errors.*", text):
        raise SystemExit(f"{arm.label}, {form}: {bad[0]}")
    return parsed(text)


def memory(process: psutil.Process) -> float:
    """MiB of all processes of a server that are not shared with others."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += one.memory_full_info().uss
    return total / 2**20


def measure_limit(store: Path, seconds: int) -> dict[str, float]:
    """Images a second in a process that does nothing else, by batch size."""
    command = [sys.executable, "-m", "benchmarks.serving.servers", "--limit", str(store), "--seconds", str(seconds)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def render(cells: list[dict]) -> str:
    """The latest run of each setting as a table."""
    latest = {setting(cell): cell["run"] for cell in cells}
    parts = ["# Servers of one ensemble"]
    for chosen, run in latest.items():
        own = [cell for cell in cells if setting(cell) == chosen and cell["run"] == run]
        parts += section(chosen, own)
    return "\n\n".join(parts) + "\n"


def setting(cell: dict) -> tuple:
    return cell["network"], cell["members"], cell["batch"]


def section(chosen: tuple, cells: list[dict]) -> Iterator[str]:
    network, members, batch = chosen
    limits = [cell for cell in cells if cell["server"] == "without a server"]
    without = {size: statistics.median(one[size] for one in limits) for size in ("1", "8", "32")}
    best = max(without.values())
    rows = []
    keys = dict.fromkeys((cell["form"], cell["connections"]) for cell in cells if "form" in cell)
    for form, connections in sorted(keys, key=lambda key: (FORMS.index(key[0]), key[1])):
        here = [cell for cell in cells if cell.get("form") == form and cell["connections"] == connections]
        ours = statistics.median([cell["rate"] for cell in here if cell["server"] == "modepath"] or [0])
        for server in dict.fromkeys(cell["server"] for cell in here):
            own = [cell for cell in here if cell["server"] == server]
            rate, rates = statistics.median(cell["rate"] for cell in own), [cell["rate"] for cell in own]
            numbers = [statistics.median(cell[what] for cell in own) for what in ("p50", "p99", "cpu_ms", "memory")]
            compared = without["1"] if connections == 1 and batch == 1 else best
            rows.append(
                [
                    form, connections, server, f"{rate:.4g}", f"{min(rates):.4g} to {max(rates):.4g}",
                    *(f"{number:.{digits}f}" for number, digits in zip(numbers, (2, 2, 2, 0), strict=True)),
                    f"{ours / rate:.2f}", "" if "random" in form else f"{rate * batch / compared:.2f}",
                ]
            )  # fmt: skip
    yield f"## {members} × {network}, {batch} image{'s' if batch > 1 else ''} a request"
    yield (
        f"`python -m benchmarks.serving.servers --network {network} --members {members} --batch {batch}`, {cells[0]['run']}, "
        f"{len(os.sched_getaffinity(0))} cores, shared with the load generator; medians of {len(limits)} interleaved rounds. Images a second without a server, by batch: "
        + ", ".join(f"{size}: {rate:.4g}" for size, rate in without.items())
        + f". The limit is the best of them, {best:.4g}; at one connection and one image it is that of batch 1."
    )
    heads = [
        "form",
        "connections",
        "server",
        "requests/s",
        "range",
        "p50 ms",
        "p99 ms",
        "CPU ms",
        "MiB",
        "ours ÷ it",
        "of the limit",
    ]
    yield tabulate(rows, heads, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
