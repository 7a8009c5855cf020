"""What a step on a path costs compared with a plain step of the same network: time and memory, measured in one run.

    python -m benchmarks.training.step_cost [NETWORK] [BATCH]      (default: preresnet8 128 for time, wrn-28-10 at 2 and 32 and preresnet8 at 128 for memory)

`curve` is a Bezier curve with one bend, one network a step; `simplex` the third further vertex of a simplex, with one and with five
networks a step.
On the CPU. Time: the kinds take turns, in blocks of as many passes each, so that a disturbance weighs alike; the median of the blocks' ratios is
reported. Memory: a process of its own for each kind; its largest resident size (Linux) beyond what it held before the network was made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional

from models_store.manifest import InputSpec
from training import curve, espro, networks
from training.data import Data, InMemory
from training.data.augment import Augment
from training.optimisation import hardware
from training.optimisation.steps import BetweenVertices, OneNetwork, Step, Training, pull_of

SHAPE = (1, 28, 28)
BLOCKS, PASSES = 75, 10
KINDS = ("plain", "curve", "simplex, 1", "simplex, 5")
PASSES_OF_STEP = {"plain": 1, "curve": 1, "simplex, 1": 1, "simplex, 5": 5}
WANTED = {"curve": 1.10, "simplex, 1": 1.10, "simplex, 5": 5.30}  # plain steps
DRAWS = np.random.default_rng(0)


def _data(split: InMemory) -> Data:
    return Data(
        train=split, validation=split, test=split, classes=[str(c) for c in range(10)], input=InputSpec(shape=SHAPE), mean=(0.5,), std=(0.5,),
        augment=Augment(), fingerprint="step_cost",
    )  # fmt: skip


def make(kind: str, name: str):
    """A network and how it steps."""
    config = espro.Config(precision="32", device="cpu", points_per_step=PASSES_OF_STEP[kind])
    fabric = hardware.launch(config)
    network = networks.build(name, 10, SHAPE, {}).to(memory_format=torch.channels_last)
    images = torch.rand(8, *SHAPE)
    split = InMemory(images, torch.arange(8) % 10)
    training = Training(config, fabric, network, _data(split))
    if kind == "plain":
        return network, OneNetwork(training)
    # What lies in the files of the fixed vertices is given here.
    if kind == "curve":
        span = curve.between(curve.Config(), [Path(), Path()])
    else:
        span = espro.within(config, dict.fromkeys(range(3), Path()), [[0, 1, 2, 3]], 3)
    count = sum(file is not None for file in span.vertices)
    fixed = [{k: v.clone() for k, v in networks.build(name, 10, SHAPE, {}).state_dict().items()} for _ in range(count)]
    return network, BetweenVertices(training, span, fixed, set())


def step(network, steps, images, labels) -> None:
    steps.take(pull_of(lambda: functional.cross_entropy(network(images), labels)), Step(1, 0.01, DRAWS, len(images)))


def batch(size: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, *SHAPE, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(size) % 10


def times(name: str, size: int) -> np.ndarray:
    """Seconds of a step in each block: (kinds, blocks)."""
    all_kinds = [make(kind, name) for kind in KINDS]
    images, labels = batch(size)
    found = np.zeros((len(KINDS), BLOCKS))
    for block in range(-2, BLOCKS):
        order = range(len(KINDS)) if block % 2 else reversed(range(len(KINDS)))
        for which in order:
            count = PASSES // PASSES_OF_STEP[KINDS[which]]
            began = time.perf_counter()
            for _ in range(count):
                step(*all_kinds[which], images, labels)
            if block >= 0:
                found[which, block] = (time.perf_counter() - began) / count
    return found


def peak(kind: str, name: str, size: int) -> None:
    """In a process of its own: print its largest resident size beyond the libraries', and a weight set, in bytes."""
    images, labels = batch(size)
    functional.cross_entropy(torch.rand(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    network, steps = make(kind, name)
    for _ in range(3):
        step(network, steps, images, labels)
    print(json.dumps({"peak": resident("VmHWM") - before, "weights": sum(p.nbytes for p in network.parameters())}))


def resident(which: str) -> int:
    """Bytes of this process: VmRSS, now; VmHWM, the most so far."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(which))
    return int(line.split()[1]) * 1024


def memory(name: str, size: int) -> str:
    rows, plain = [], 0.0
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.training.step_cost", "--peak", kind, name, str(size)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        sets = found["peak"] / found["weights"]
        plain = plain or found["peak"]
        vertices = {"plain": 0, "curve": 3}.get(kind, 4)
        rows.append([kind, f"{found['peak'] / 2**20:.0f} MiB", f"{found['peak'] / plain:.2f}", f"{sets:.2f}", vertices])
    headers = [
        f"memory, {name}, batch {size}",
        "peak",
        "over plain (wanted: at most 1.5)",
        "in weight sets",
        "vertices among them",
    ]
    return tabulate(rows, headers, tablefmt="github")


def main(name: str = "preresnet8", size: int = 128) -> None:
    found = times(name, size)
    print(f"time, {name}, batch {size}, {BLOCKS} blocks of {PASSES} passes: plain {np.median(found[0]) * 1e3:.1f} ms")
    for kind, seconds in zip(KINDS[1:], found[1:], strict=True):
        ratio = seconds / found[0]
        quartiles = f"{np.quantile(ratio, 0.25):.3f} … {np.quantile(ratio, 0.75):.3f}"
        print(
            f"{kind} {np.median(seconds) * 1e3:.1f} ms, ratio {np.median(ratio):.3f} (quartiles {quartiles}); wanted: at most {WANTED[kind]:.2f}"
        )
    for heavy, images in (
        (("wrn-28-10", 2), ("wrn-28-10", 32), ("preresnet8", 128)) if len(sys.argv) == 1 else ((name, size),)
    ):
        print(memory(heavy, images))


if __name__ == "__main__":
    if "--peak" in sys.argv:
        peak(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
