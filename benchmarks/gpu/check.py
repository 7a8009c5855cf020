"""Everything in this project that needs a GPU, in pieces of at most 8 minutes.

    make gpu-check            or  python -m benchmarks.gpu.check [--only PIECE …] [--fresh]

Each piece writes benchmarks/results/gpu/PIECE.md; a piece that has its table is not run again. A piece that fails says why and leaves no
table, so that the next call tries it again. Exit code 0: every table is there; 1: a piece failed; 3: this machine has no GPU.

Nothing is installed: where a package is missing, the pieces that need it fail with its name. `--on cpu` is for trying the pieces out
where there is no GPU; it writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/gpu"
SECONDS = 8 * 60
NO_GPU = 3
Rows = tuple[Sequence[str], list[Sequence[Any]]]  # names of columns, and rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PIECES), help="run only these pieces")
    parser.add_argument("--fresh", action="store_true", help="run pieces again that have a table")
    parser.add_argument("--on", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--piece", choices=list(PIECES), help=argparse.SUPPRESS)  # the process of one piece
    args = parser.parse_args()
    if args.on == "cuda" and (why := missing_gpu()) is not None:
        print(f"gpu-check: {why}")
        return NO_GPU
    if args.piece:
        print(json.dumps(PIECES[args.piece](args.on)))
        return 0
    failed = [name for name in args.only or PIECES if not done(name, args)]
    if failed:
        print(f"gpu-check: {', '.join(failed)} failed; the next call tries again.")
    return int(bool(failed))


def missing_gpu() -> str | None:
    """Why nothing can be checked here; None where a GPU is ready."""
    try:
        import torch
    except ImportError as error:
        return f"{error}. Install torch."
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine. Nothing was run. If there is one, check its driver (nvidia-smi) and that torch was built for it."
    return None


def done(name: str, args: argparse.Namespace) -> bool:
    table = RESULTS / f"{name}.md"
    if table.exists() and not args.fresh:
        print(f"gpu-check: {name}: done before")
        return True
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--piece", name, "--on", args.on]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"gpu-check: {name}: not done after {SECONDS} s")
        return False
    if run.returncode:
        last = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
        print(f"gpu-check: {name}: {last}")
        return False
    heads, rows = json.loads(run.stdout.splitlines()[-1])
    lines = [heads, ["---"] * len(heads), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    print(f"gpu-check: {name}: {time.monotonic() - began:.0f} s\n{text}")
    if args.on == "cuda":
        RESULTS.mkdir(parents=True, exist_ok=True)
        when = time.strftime("%Y-%m-%d")
        table.write_text(
            f"# {name}\n\n`python -m benchmarks.gpu.check --only {name}`, {when}, {hardware()}\n\n{text}\n"
        )
    return True


def hardware() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def environment(on: str) -> Rows:
    """What is installed, and which providers ONNX Runtime can use."""
    import torch

    rows: list[Sequence[Any]] = [("Python", platform.python_version())]
    for package in ("torch", "torchvision", "onnx", "onnxruntime", "onnxruntime-gpu", "lightning-fabric", "bentoml"):
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    if on == "cuda":
        free, total = torch.cuda.mem_get_info()
        rows += [
            ("GPU", torch.cuda.get_device_name()),
            ("CUDA of torch", torch.version.cuda),
            ("GPU memory, free of total", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB"),
            ("bf16 in hardware", torch.cuda.is_bf16_supported(including_emulation=False)),
        ]
    try:
        import onnxruntime

        rows.append(("providers of ONNX Runtime", ", ".join(onnxruntime.get_available_providers())))
    except ImportError as error:
        rows.append(("providers of ONNX Runtime", str(error)))
    return ("what", "found"), rows


# Short trainings on the embedded data: what is checked is that each method runs, publishes members that agree with their
# network to 1e-5, and reaches what the CPU reaches.
TRAININGS = {
    "fge": ["training.fge", "--epochs", "40", "--members", "4"],
    "curve": ["training.curve", "--epochs", "20"],
    "simplex": ["training.espro", "--epochs", "20"],
    "swag": ["training.swag", "--epochs", "40", "--members", "4"],
}


def training(on: str) -> Rows:
    """Each method in float32 and bf16: time, and what its average reaches on validation."""
    rows: list[Sequence[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for method, command in TRAININGS.items():
            for precision in ("32", "bf16"):
                name = f"{method}-{precision}"
                spent, scores = trained(folder, name, [*command, "--device", on, "--precision", precision])
                rows.append((method, precision, f"{spent:.1f}", f"{scores['accuracy']:.4f}", f"{scores['nll']:.4f}"))
    return ("method", "precision", "seconds", "validation accuracy of the average", "NLL, nats"), rows


def trained(folder: str, name: str, command: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Seconds of one training, the start of its process included, and the scores of what it published."""
    environment = {**os.environ, "MODELS_STORE": f"{folder}/store", "MODEPATH_RUNS": f"{folder}/runs"}
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", *command, "--dataset", "digits", "--network", "preresnet8", "--batch-size", "64", "--name", name, "--activate-anyway"],
        cwd=ROOT, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"{name}: {(run.stderr.strip() or run.stdout.strip()).splitlines()[-1]}")
    (manifest,) = Path(folder, "store", name).glob("*/manifest.json")
    return time.monotonic() - began, json.loads(manifest.read_text())["validation"]


def parity(on: str) -> Rows:
    """The published ONNX files on the CPU and on the GPU: the largest difference of their logits, relative to the largest logit."""
    import numpy as np

    from models_store.graphs.runtime import EnsembleSession
    from models_store.store import Store

    rows: list[Sequence[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("32", "bf16"):
            name = f"fge-{precision}"
            trained(folder, name, [*TRAININGS["fge"], "--device", on, "--precision", precision])
            version = Store(Path(folder, "store")).resolve(name)
            images = np.random.default_rng(0).random((64, *version.manifest.input.shape), np.float32)
            found = [
                EnsembleSession(version.folder, version.manifest, provider).logits(images) for provider in ("cpu", on)
            ]
            rows.append((precision, f"{np.abs(found[0] - found[1]).max() / np.abs(found[0]).max():.2e}"))
    return ("precision of the training", "largest relative difference"), rows


def steps(on: str) -> Rows:
    """Time of a training step of a plain network, a point of a Bezier curve, and a point of a simplex, by precision."""
    import torch

    from training.networks import build

    rows: list[Sequence[Any]] = []
    device = torch.device(on)
    size, repeats = (256, 30) if on == "cuda" else (8, 2)
    images, labels = torch.rand(size, 3, 32, 32, device=device), torch.randint(10, (size,), device=device)
    network = build("preresnet20", 10, (3, 32, 32), {}).to(device)
    names = [name for name, _ in network.named_parameters()]
    vertices = [[p.detach().clone().requires_grad_() for p in network.parameters()] for _ in range(3)]
    for what, count in (("plain", 1), ("Bezier curve, one bend", 3), ("simplex, three vertices", 3)):
        for precision in ("32", "bf16"):
            spent: list[float] = []
            for _ in range(repeats + 3):
                t = torch.rand(()).item()
                weights = {
                    "plain": [1.0], "Bezier curve, one bend": [(1 - t) ** 2, 2 * t * (1 - t), t**2],
                    "simplex, three vertices": torch.distributions.Dirichlet(torch.ones(3)).sample().tolist(),
                }[what]  # fmt: skip
                began = synchronised(on)
                point = {
                    name: sum(w * v[i] for w, v in zip(weights, vertices[:count], strict=True))
                    for i, name in enumerate(names)
                }
                with torch.autocast(on, torch.bfloat16, enabled=precision == "bf16"):
                    logits = torch.func.functional_call(network, point, (images,))
                    loss = torch.nn.functional.cross_entropy(logits, labels)
                loss.backward()
                spent.append(synchronised(on) - began)
            rows.append((what, precision, f"{1000 * statistics.median(spent[3:]):.2f}"))
    return ("step", "precision", f"ms, batch {size}, preresnet20, 32 × 32"), rows


def synchronised(on: str) -> float:
    import torch

    if on == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def serving(on: str) -> Rows:
    """Five ResNet-50 members behind HTTP at 1, 8 and 64 connections, and how busy the GPU is."""
    import onnxruntime

    if on == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise SystemExit("this onnxruntime has no CUDA provider: install onnxruntime-gpu and the extra modepath[cuda]")
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed")
    from benchmarks.serving import servers, throughput

    network = "resnet50" if on == "cuda" else "preresnet8"
    rows: list[Sequence[Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = throughput.publish(folder / "store", 5, network=network)
        shape, classes = throughput.SHAPES[network]
        sent = servers.requests(
            throughput.np.random.default_rng(0).random((1, *shape), throughput.np.float32), classes
        )["npy"]
        environment = {"MODELS_STORE": str(folder / "store"), "MODEPATH_PROVIDERS": on, "MODEPATH_WORKERS": "1"}
        arm = throughput.Arm("modepath", ["bentoml", "serve", "--port", "{port}"], environment)
        with throughput.running(arm, folder / "log") as (url, _):
            throughput.until_ready(url)
            base = url.removesuffix("/predict")
            for connections in (1, 8, 64):
                servers.load(arm, base, "npy", sent, connections, 3, folder)
                with Busy(on) as busy:
                    cell = servers.load(arm, base, "npy", sent, connections, 15, folder)
                rows.append(
                    (connections, f"{cell['rate']:.1f}", f"{cell['p50']:.1f}", f"{cell['p99']:.1f}", busy.share())
                )
        assert members.is_dir()
    return ("connections", "requests/s", "p50 ms", "p99 ms", "GPU busy, %"), rows


class Busy:
    """Samples how busy the GPU is, by nvidia-smi."""

    def __init__(self, on: str):
        self._on, self._found, self._over = on, list[int](), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Busy:
        if self._on == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _sample(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self._over.wait(0.5):
            text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            self._found += [int(number) for number in re.findall(r"\d+", text)[:1]]

    def share(self) -> str:
        """The median."""
        return f"{statistics.median(self._found):.0f}" if self._found else "unknown"


PIECES: dict[str, Callable[[str], Rows]] = {
    "environment": environment, "steps": steps, "training": training, "parity": parity, "serving": serving,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
