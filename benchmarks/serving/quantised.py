"""Members in int8 and bf16 beside the published float32 ones: rate, size, accuracy, NLL and agreement.

    python -m benchmarks.serving.quantised NAME --dataset fashion-mnist [--images 512] [--members 4]
    python -m benchmarks.serving.quantised resnet50 --images 64      random weights: rates alone

Each member is quantised as `--quantize` does it. Rates
are those of one session with one thread, at batch 1 and 32, in rounds that take turns. The table goes to benchmarks/results/quantised.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tabulate import tabulate

from benchmarks.serving.throughput import SHAPES, publish
from models_store.store import Store
from models_store.uncertainty import softmax
from training.data import as_arrays, load
from training.data.options import DataOptions
from training.members.quantising import Quantiser

RESULT = Path(__file__).parents[1] / "results/quantised.md"
ROUNDS, SECONDS = 5, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=512, help="training images that the ranges are measured on")
    parser.add_argument("--members", type=int, default=4)
    args = parser.parse_args()
    if args.name in SHAPES:
        of_network(args)
        return
    version = Store().resolve(args.name)
    data = load(DataOptions(args.dataset))
    train, test = as_arrays(data.train, args.images), as_arrays(data.test)
    files = sorted((version.folder / "members").glob("*.onnx"))[: args.members]
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, list[Path]] = {"float32": files, "int8": [], "bf16": []}
        for file in files:
            for kind in ("int8", "bf16"):
                kinds[kind].append(quantised(kind, file, Path(folder), train[0]))
        probs = {kind: np.stack([of(file, test[0]) for file in own]) for kind, own in kinds.items()}
        rates = measured(kinds)
        sizes = {kind: sum(file.stat().st_size for file in own) / len(own) / 2**20 for kind, own in kinds.items()}
    rows = []
    for kind, own in probs.items():
        mean = own.mean(axis=0)
        members = [scores(one, test[1]) for one in own]
        accuracy, nll = scores(mean, test[1])
        rows.append(
            [
                kind, f"{sizes[kind]:.2f}", *(shown(rates[kind, batch]) for batch in (1, 32)),
                f"{statistics.mean(one[0] for one in members):.4f}", f"{accuracy:.4f}", f"{nll:.4f}",
                f"{(mean.argmax(1) == probs['float32'].mean(axis=0).argmax(1)).mean():.4f}",
                f"{np.abs(mean - probs['float32'].mean(axis=0)).max():.4f}",
            ]
        )  # fmt: skip
    heads = ["members", "MiB each", "images/s, batch 1", "images/s, batch 32", "accuracy of a member", "accuracy of the average", "NLL, nats", "labels as float32", "largest difference of a probability"]  # fmt: skip
    table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    text = (
        f"# Members in int8 and bf16\n\n`python -m benchmarks.serving.quantised {args.name} --dataset {args.dataset} --images {args.images} --members {args.members}`: {len(files)} members, "
        f"{len(test[1])} test images; medians and ranges of {ROUNDS} rounds, one thread.\n\n{table}\n"
    )
    print(text)
    RESULT.write_text(text)


def of_network(args: argparse.Namespace) -> None:
    """Rates and sizes of a network with random weights; its scores would say nothing."""
    shape, _ = SHAPES[args.name]
    with tempfile.TemporaryDirectory() as folder:
        (file,) = publish(Path(folder) / "store", 1, network=args.name).glob("*.onnx")
        images = np.random.default_rng(0).random((args.images, *shape), np.float32)
        kinds = {
            "float32": [file],
            **{kind: [quantised(kind, file, Path(folder), images)] for kind in ("int8", "bf16")},
        }
        rates, sizes = measured(kinds), {kind: own[0].stat().st_size / 2**20 for kind, own in kinds.items()}
    rows = [[kind, f"{sizes[kind]:.1f}", *(shown(rates[kind, batch]) for batch in (1, 32))] for kind in kinds]
    table = tabulate(
        rows,
        ["members", "MiB each", "images/s, batch 1", "images/s, batch 32"],
        tablefmt="github",
        disable_numparse=True,
    )
    command = f"`python -m benchmarks.serving.quantised {args.name} --images {args.images}`: random weights, one thread"
    text = f"\n## {args.name}\n\n{command}; medians and ranges of {ROUNDS} rounds.\n\n{table}\n"
    print(text)
    with RESULT.open("a") as result:
        result.write(text)


def quantised(kind: str, file: Path, folder: Path, images: np.ndarray) -> Path:
    made = folder / f"{kind}-{file.name}"
    made.write_bytes(Quantiser("int8" if kind == "int8" else "bf16", images)(file.read_bytes()))
    return made


def opened(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def of(file: Path, images: np.ndarray) -> np.ndarray:
    session = opened(file)
    name = session.get_inputs()[0].name
    logits = [np.asarray(session.run(["logits"], {name: images[i : i + 250]})[0]) for i in range(0, len(images), 250)]
    return softmax(np.concatenate(logits))


def measured(kinds: dict[str, list[Path]]) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    sessions = {kind: opened(files[0]) for kind, files in kinds.items()}
    for _ in range(ROUNDS):
        for kind, session in sessions.items():
            for batch in (1, 32):
                given = session.get_inputs()[0]
                images = np.random.default_rng(0).random((batch, *given.shape[1:]), np.float32)
                session.run(["logits"], {given.name: images})
                began, count = time.perf_counter(), 0
                while time.perf_counter() - began < SECONDS:
                    session.run(["logits"], {given.name: images})
                    count += batch
                found.setdefault((kind, batch), []).append(count / (time.perf_counter() - began))
    return found


def scores(probs: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    right = probs[np.arange(len(labels)), labels]
    return float((probs.argmax(1) == labels).mean()), float(-np.log(np.clip(right, 1e-12, None)).mean())


def shown(rates: list[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


if __name__ == "__main__":
    main()
