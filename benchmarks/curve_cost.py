"""What a step of curve training costs beside a plain step of the same network: time and memory, measured in one run.

    python -m benchmarks.curve_cost [NETWORK] [BATCH]      (default: preresnet8 128 for time, wrn-28-10 2 for memory)

Time: plain steps and steps of a Bezier curve with one bend take turns, in blocks; the median of the blocks' ratios is reported. Memory: a process of
its own for each kind; its largest resident size beyond what it held before the network was made, in units of one weight set.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional

from training import hardware, networks
from training.curve import Config
from training.geometry import coefficients
from training.geometry.vertices import combine
from training.steps import BetweenVertices, OneNetwork, Span

SHAPE = (1, 28, 28)
BLOCKS, STEPS = 150, 2
DRAWS = np.random.default_rng(0)


def make(kind: str, name: str):
    """A network and how it steps."""
    config = Config(precision="32")
    fabric = hardware.launch(config)
    network = networks.build(name, 10, SHAPE, {}).to(memory_format=torch.channels_last)
    if kind == "plain":
        return network, OneNetwork(config, fabric, network)
    ends = [{k: v.clone() for k, v in networks.build(name, 10, SHAPE, {}).state_dict().items()} for _ in range(2)]
    span = Span(
        vertices=(Path(), None, Path()),  # what lies in the files is given below
        begin=lambda given: [combine(given, [0.5, 0.5])],
        draw=lambda drawn: coefficients.curve("bezier", drawn.random(1), 1),
        shown=np.ones(3) / 3,
    )
    return network, BetweenVertices(config, fabric, network, span, ends, set())


def step(network, steps, images, labels) -> None:
    steps.take(lambda: functional.cross_entropy(network(images), labels), 0.01, DRAWS)


def batch(size: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, *SHAPE, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(size) % 10


def times(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a step in each block: plain, curve."""
    both = [make(kind, name) for kind in ("plain", "curve")]
    images, labels = batch(size)
    found = np.zeros((2, BLOCKS))
    for block in range(-2, BLOCKS):
        for which in (0, 1) if block % 2 else (1, 0):
            began = time.perf_counter()
            for _ in range(STEPS):
                step(*both[which], images, labels)
            if block >= 0:
                found[which, block] = (time.perf_counter() - began) / STEPS
    return found[0], found[1]


def peak(kind: str, name: str, size: int) -> None:
    """In a process of its own: print its largest resident size beyond the libraries', and a weight set, in bytes."""
    images, labels = batch(size)
    functional.cross_entropy(torch.rand(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    network, steps = make(kind, name)
    for _ in range(3):
        step(network, steps, images, labels)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": after - before, "weights": sum(p.nbytes for p in network.parameters())}))


def main(
    time_name: str = "preresnet8", time_size: int = 128, memory_name: str = "wrn-28-10", memory_size: int = 2
) -> None:
    plain, curve = times(time_name, time_size)
    ratio = curve / plain
    print(
        f"time, {time_name}, batch {time_size}, {BLOCKS} blocks of {STEPS}: plain {np.median(plain) * 1e3:.1f} ms, curve "
        f"{np.median(curve) * 1e3:.1f} ms, ratio {np.median(ratio):.3f} (quartiles {np.quantile(ratio, 0.25):.3f} … {np.quantile(ratio, 0.75):.3f})"
    )
    rows, peaks = [], {}
    for kind in ("plain", "curve"):
        command = [sys.executable, "-m", "benchmarks.curve_cost", "--peak", kind, memory_name, str(memory_size)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        peaks[kind] = found["peak"] / found["weights"]
        rows.append([kind, f"{found['peak'] / 2**20:.0f} MiB", f"{peaks[kind]:.2f}"])
    print(tabulate(rows, [f"memory, {memory_name}, batch {memory_size}", "peak", "in weight sets"], tablefmt="github"))
    print(f"curve beyond plain: {peaks['curve'] - peaks['plain']:.2f} weight sets, 3 of them the vertices")


if __name__ == "__main__":
    if "--peak" in sys.argv:
        peak(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
