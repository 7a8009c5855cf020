"""How far apart related and unrelated networks lie, in the distance by which models_store/lineage.py knows copies again.

python -m benchmarks.training.lineage            trains small networks on digits (a minute on a CPU)

A tensor's distance: mean removed, divided by the norm, sketched as lineage.py does. Of two networks the tensor that differs least decides
whether they are related; where networks are unrelated, or trained further, the table gives the least over all pairs and tensors. A
rounded copy must be known again by some tensor, and should be by most: the table gives the median tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from models_store import lineage
from training import data, networks
from training.config import Config

NETWORKS = {"preresnet8": {"width": 0.5}, "mlp": {"hidden": 1024}}
EPOCHS = 6
State = dict[str, torch.Tensor]


def trained(name: str, found: data.Data, *, start: State | int, order: int, rate: float, epochs: int = EPOCHS) -> State:
    torch.manual_seed(start if isinstance(start, int) else 0)
    network = networks.build(name, len(found.classes), found.shape, NETWORKS[name])
    if not isinstance(start, int):
        network.load_state_dict(start)
    images, labels = map(torch.from_numpy, data.as_arrays(found.train))
    steps = epochs * (len(images) // 64)
    optimiser = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(order)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64)[: len(images) // 64]:
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images[rows] * 2 - 1), labels[rows]).backward()
            optimiser.step()
            schedule.step()
    return {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}


def rounded(state: State, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    return {key: change(tensor).float() for key, tensor in state.items() if tensor.is_floating_point()}


def int8(tensor: torch.Tensor) -> torch.Tensor:
    step = tensor.abs().max().clamp(min=1e-12) / 127
    return (tensor / step).round() * step


def distances(one: State, other: State) -> dict[str, float]:
    """Of the tensors of one name."""

    def sketch(state: State, name: str) -> np.ndarray | None:
        made = lineage._sketch(state[name].numpy())
        return None if made is None else lineage._read([made])[1][0]

    large = [n for n, t in one.items() if n in other and t.is_floating_point() and t.numel() >= lineage.SKETCHED]
    pairs = {name: (sketch(one, name), sketch(other, name)) for name in large}
    return {
        name: float(np.linalg.norm(a - b)) / lineage.PROJECTIONS**0.5
        for name, (a, b) in pairs.items()
        if a is not None and b is not None
    }


def main() -> None:
    found = data.load(Config(name="x", dataset="digits").data_options())
    rows = []
    for name in NETWORKS:
        bases = [trained(name, found, start=seed, order=seed, rate=0.05) for seed in range(3)]
        roundings = {
            "one ulp": lambda t: torch.nextafter(t, torch.full_like(t, torch.inf)),
            "float16": torch.Tensor.half,
            "bfloat16": torch.Tensor.bfloat16,
            "int8, one scale a tensor": int8,
        }
        for label, change in roundings.items():
            all_of = [sorted(distances(base, rounded(base, change)).values()) for base in bases]
            shares = np.mean([np.mean(np.array(found) < lineage.NEAR) for found in all_of])
            rows.append(
                [name, f"rounded: {label}", f"{np.median(np.concatenate(all_of)):.2g} (median)", f"{shares:.0%}"]
            )
        groups: dict[str, list[tuple[State, State]]] = {
            f"trained on at rate {rate:g}, 2 epochs": [
                (base, trained(name, found, start=base, order=9, rate=rate, epochs=2)) for base in bases
            ]
            for rate in (1e-4, 1e-3, 1e-2, 5e-2)
        }
        groups["the same initial weights, another order"] = [
            (base, trained(name, found, start=seed, order=9, rate=0.05)) for seed, base in enumerate(bases)
        ]
        groups["trained apart"] = list(itertools.combinations(bases, 2))
        for label, pairs in groups.items():
            per_pair = [distances(one, other) for one, other in pairs]
            least, tensor = min((d, key) for found in per_pair for key, d in found.items())
            shares = np.mean([np.mean(np.array(list(found.values())) < lineage.NEAR) for found in per_pair])
            rows.append([name, label, f"{least:.2g} ({tensor})", f"{shares:.0%}"])
    print(
        tabulate(rows, ["network", "the other one", "distance", f"tensors nearer than {lineage.NEAR}"], tablefmt="pipe")
    )


if __name__ == "__main__":
    main()
