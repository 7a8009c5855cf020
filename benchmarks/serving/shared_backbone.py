"""Heads on one frozen backbone: rate, memory and answers of 12 members, compared with one member; size of a bank of 256 heads.

    python -m benchmarks.serving.shared_backbone            needs wrk; writes results/shared_backbone.md; about 8 minutes on 2 cores

The backbone is torchvision's resnet18 with random weights, the images are 64×64. One image per request, npy. Two servers take turns.
The bank: a curve between two heads, trained with --train 'network.fc.*' on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from tabulate import tabulate

from benchmarks.serving.throughput import Arm, npy_script, running, until_ready, wrk
from models_store.graphs.runtime import EnsembleSession, MemberSession
from models_store.manifest import Draft, InputSpec, Member, Origin
from models_store.store import Store, Version
from training import curve, networks
from training.members.export import Exporter, Normalised

RESULT = Path(__file__).parents[1] / "results/shared_backbone.md"
SPEC, CLASSES, MEMBERS = InputSpec(shape=(3, 64, 64)), 10, 12
CONNECTIONS = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    args = parser.parse_args()
    images = np.random.default_rng(0).random((64, *SPEC.shape), np.float32)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        several, one = (
            publish(Store(folder / name), count, images) for name, count in (("several", MEMBERS), ("one", 1))
        )
        off = parity(several, images)
        size = (one.folder / "members/000.onnx").stat().st_size / 2**20
        rows, memory = rates(folder, (one, several), images, args)
        bank = bank_size(folder)
    lines = [
        "# Members that share a backbone", "",
        f"`python -m benchmarks.serving.shared_backbone`, {len(os.sched_getaffinity(0))} cores shared with wrk, {args.rounds} rounds of {args.seconds} s.", "",
        tabulate(rows, ["connections", "one member, requests/s", f"{MEMBERS} members", "ratio: median (range)"], tablefmt="github", disable_numparse=True), "",
        f"Memory of a worker: {memory[0]:.0f} MiB with one member, {memory[1]:.0f} MiB with {MEMBERS}; a member's file has {size:.1f} MiB.",
        f"Largest difference of a logit from members that run alone: {off:.1e}.", "", bank, "",
    ]  # fmt: skip
    RESULT.write_text("\n".join(lines))
    print(RESULT.read_text())


def publish(store: Store, count: int, images: np.ndarray) -> Version:
    """Heads with random weights on one backbone."""
    torch.manual_seed(0)
    network = networks.build("torchvision:resnet18", CLASSES, SPEC, {})
    exporter = Exporter(SPEC)
    with store.staging("heads") as staged:
        (staged / "members").mkdir()
        members = []
        for number in range(count):
            own = copy.deepcopy(network)
            torch.manual_seed(number)
            own.get_submodule("fc").reset_parameters()
            model, _ = exporter.export(Normalised(own, (0.5,) * 3, (0.25,) * 3), images[:8], torch.device("cpu"))
            (staged / f"members/{number:03d}.onnx").write_bytes(model)
            members.append(Member(file=f"members/{number:03d}.onnx", origin=Origin(), weight=1 / count))
        draft = Draft(method="import", input=SPEC, classes=[str(c) for c in range(CLASSES)], members=members)
        return store.publish("heads", staged, draft)


def parity(version: Version, images: np.ndarray) -> float:
    """Largest difference between members in one graph and alone."""
    together = EnsembleSession(version.folder, version.manifest, "cpu").logits(images)
    alone = [MemberSession(version.folder / member.file, "cpu").logits(images) for member in version.manifest.members]
    return float(np.abs(together - np.stack(alone)).max())


def rates(
    folder: Path, versions: tuple[Version, Version], images: np.ndarray, args: argparse.Namespace
) -> tuple[list[list[str]], list[float]]:
    """Requests a second of two servers that take turns, and the memory of their workers in MiB."""
    script = npy_script(folder, "predict", images)
    memory = []
    found: dict[int, list[list[float]]] = {connections: [[], []] for connections in CONNECTIONS}
    arms = [
        Arm(
            "modepath",
            ["bentoml", "serve", "--host", "127.0.0.1", "--port", "{port}"],
            {"MODEPATH_PORT": "{port}", "MODELS_STORE": str(version.folder.parents[1]), "MODEPATH_FEEDBACK": "off"},
        )
        for version in versions
    ]
    with running(arms[0]) as (first, one), running(arms[1]) as (second, other):
        urls = [first, second]
        for url in urls:
            until_ready(url)
            wrk(url, script, 8, 2)
        for number in range(args.rounds):
            for connections in CONNECTIONS:
                for arm in (0, 1) if number % 2 else (1, 0):
                    found[connections][arm].append(wrk(urls[arm], script, connections, args.seconds)["rate"])
        for process in (one, other):
            workers = psutil.Process(process.pid).children(recursive=True)
            memory.append(max(child.memory_info().rss for child in workers) / 2**20)
    rows = []
    for connections, (alone, together) in found.items():
        ratios = np.array(together) / np.array(alone)
        shown = f"{np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
        rows.append([str(connections), f"{np.median(alone):.0f}", f"{np.median(together):.0f}", shown])
    return rows, memory


def bank_size(folder: Path) -> str:
    """The size of a bank of 256 heads, in weight sets."""
    os.environ.update(MODELS_STORE=str(folder / "bank"), MODEPATH_RUNS=str(folder / "runs"))
    torch.manual_seed(0)
    ends = []
    network = networks.build("torchvision:resnet18", CLASSES, (1, 8, 8), {})
    for number in range(2):
        network.get_submodule("network.fc").reset_parameters()
        ends.append(folder / f"{number}.pt")
        torch.save(network.state_dict(), ends[-1])
    config = curve.Config(
        name="bank", dataset="digits", network="torchvision:resnet18", epochs=1, limit=500, bank=256, members=2, bn_images=64,
        train=("network.fc.*",), endpoints=tuple(map(str, ends)),
    )  # fmt: skip
    version = curve.run(config)
    size = sum(file.stat().st_size for file in (version.folder / "bank").iterdir())
    weights = sum(tensor.numel() * 4 for tensor in network.state_dict().values() if tensor.is_floating_point())
    return f"A bank of {version.manifest.bank.points} heads takes {size / 2**20:.1f} MiB, {size / weights:.2f} weight sets."


if __name__ == "__main__":
    main()
