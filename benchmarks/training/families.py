"""Do networks of other people's design become published members? Each with random weights, on random images.

    python -m benchmarks.training.families [torchvision:NAME …]

For each family: the trial before training (`training.optimisation.trial`), one member made and published with parity checked, and its bank of
two points. Random weights: what is measured is whether the network can be served, not what it knows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from models_store.manifest import Draft, InputSpec, Member, Origin
from models_store.store import Store
from training import fge, networks
from training.data import Data, InMemory
from training.data.augment import Augment
from training.errors import TrainingError
from training.members import bank, member
from training.members.export import Exporter
from training.optimisation import hardware, trial
from training.runs import Run

CLASSES = 4
# Small sides; where batch norm would see a single pixel at 32, a larger one.
FAMILIES = {
    "resnet18": 32,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 32,
    "densenet121": 32,
    "regnet_y_400mf": 64,
    "convnext_tiny": 32,
    "googlenet": 64,
    "inception_v3": 96,
    "mnasnet0_5": 64,
    "swin_t": 64,
    "vit_b_16": 32,
    "resnext50_32x4d": 32,
}


def images(side: int, seed: int) -> InMemory:
    """Random images of all brightnesses, with random labels."""
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.rand(64, 1, 1, 1, generator=generator)
    pixels = torch.rand(64, 3, side, side, generator=generator) * brightness
    return InMemory(pixels, torch.arange(64) % CLASSES)


def publish(name: str, side: int, store: Store) -> dict[str, str]:
    """What became of one family, a row of the table."""
    data = Data(
        train=images(side, 0), validation=images(side, 1), test=images(side, 2), classes=[str(c) for c in range(CLASSES)],
        input=InputSpec(shape=(3, side, side)), mean=(0.5,) * 3, std=(0.3,) * 3, augment=Augment(), fingerprint=name,
    )  # fmt: skip
    device, exporter, began = torch.device("cpu"), Exporter(data.input), time.monotonic()
    row = {"network": f"torchvision:{name}", "images": f"3×{side}×{side}"}
    try:
        torch.manual_seed(0)
        network = networks.build(f"torchvision:{name}", CLASSES, data.shape, {})
        trial.check(network, data, exporter)
        config = fge.Config(network=f"torchvision:{name}", precision="32")
        fitted = trial.fit(config, hardware.launch(config), network, data)
        row["trial, s"], row["layout"] = f"{time.monotonic() - began:.1f}", "last" if fitted.channels_last else "first"
        began = time.monotonic()
        weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        made = member.make(network, weights, data, 64, device, exporter)
        with store.staging(name.replace("_", "-")) as staged:
            (staged / "members").mkdir()
            (staged / "members/000.onnx").write_bytes(made.onnx)
            one = Member(file="members/000.onnx", origin=Origin(), weight=1)
            draft = Draft(method="random", input=data.input, classes=data.classes, members=[one])
            store.publish(name.replace("_", "-"), staged, draft)
        row["member, s"] = f"{time.monotonic() - began:.1f}"
        shifted = {k: t * 1.01 if t.is_floating_point() else t for k, t in weights.items()}
        with tempfile.TemporaryDirectory() as folder:
            points = np.array([[1.0, 0.0], [0.5, 0.5]])
            try:
                bank.build(
                    Run(Path(folder), name), network, data, [weights, shifted], points, 64, device, exporter.spec
                )
                row["bank"] = "yes"
            except TrainingError as error:
                row["bank"] = str(error)[:60]
        row["outcome"] = "published"
    except TrainingError as error:
        row["outcome"] = f"{type(error).__name__}: {str(error)[:90]}"
    return row


def main() -> None:
    """Print the table."""
    chosen = [name.removeprefix("torchvision:") for name in sys.argv[1:]] or list(FAMILIES)
    with tempfile.TemporaryDirectory() as folder:
        rows: list[dict[str, str]] = []
        for name in chosen:
            rows.append(publish(name, FAMILIES.get(name, 64), Store(Path(folder))))
            print(rows[-1], file=sys.stderr, flush=True)
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
