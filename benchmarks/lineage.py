"""How far apart related and unrelated networks lie, in the distance by which models_store/lineage.py knows copies again.

python -m benchmarks.lineage            trains small networks on digits (minutes on a CPU)

Of each pair of networks, the tensor that differs least decides: the table gives its distance (mean removed, divided by the norm; sketched
as lineage.py does), the smallest over all pairs of that kind, and whether the versions count as related.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate

from models_store import lineage
from models_store.store import Version
from training import fge, independent, snapshot

State = dict[str, torch.Tensor]
NETWORKS: dict[str, tuple[str, ...]] = {"preresnet8": ("width=0.5",), "mlp": ("hidden=1024",)}


def states(version: Version) -> list[State]:
    return [load_file(version.folder / str(member.weights)) for member in version.manifest.members]


def rounded(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list[State]], list[State]]:
    return lambda found: [{k: change(t).float() if t.is_floating_point() else t for k, t in s.items()} for s in found]


def by_ulp(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(tensor, torch.full_like(tensor, torch.inf))


def to_int8(tensor: torch.Tensor) -> torch.Tensor:
    step = tensor.abs().max().clamp(min=1e-12) / 127
    return (tensor / step).round() * step


def sketches(state: State) -> dict[str, np.ndarray]:
    large = {n: t for n, t in state.items() if t.is_floating_point() and t.numel() >= lineage.SKETCHED}
    made = {name: lineage._sketch(tensor.numpy()) for name, tensor in large.items()}
    return {name: lineage._read([sketch])[1][0] for name, sketch in made.items() if sketch}


def least(one: list[State], other: list[State]) -> tuple[float, str]:
    """The tensor of the same name that differs least, over all pairs of networks."""
    found = []
    for a in map(sketches, one):
        for b in map(sketches, other):
            found += [(float(np.linalg.norm(a[n] - b[n])) / lineage.PROJECTIONS**0.5, n) for n in a.keys() & b.keys()]
    return min(found)


def most(one: list[State], other: list[State]) -> float:
    """Of copies, in order: the least distance within the pair for which that is largest."""
    return max(least([a], [b])[0] for a, b in zip(one, other, strict=True))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MODELS_STORE": f"{folder}/store", "MODEPATH_RUNS": f"{folder}/runs"}
        rows = []
        for network, options in NETWORKS.items():
            common = {"network": network, "network_options": options, "dataset": "digits", "activate": False}
            base = independent.run(independent.Config(name="base", epochs=8, runs=2, **common))
            found = states(base)
            copies = {
                "one ulp": rounded(by_ulp),
                "float16": rounded(torch.Tensor.half),
                "bfloat16": rounded(torch.Tensor.bfloat16),
                "int8 by tensor": rounded(to_int8),
            }
            for name, change in copies.items():
                rows.append([network, f"rounded: {name}", f"{most(found, change(found)):.2g}", ""])
            start = Path(folder) / f"{network}.safetensors"
            start.write_bytes((base.folder / "weights/000.safetensors").read_bytes())
            others = {
                "fine-tuned from it, rate 1e-3": fge.Config(
                    name="tuned", epochs=4, init=(start,), alpha_1=1e-3, alpha_2=1e-4, **common
                ),
                "fine-tuned from it, rate 0.05": fge.Config(
                    name="cycles", epochs=4, init=(start,), alpha_1=0.05, alpha_2=5e-4, **common
                ),
                "the same initial weights, another schedule": snapshot.Config(
                    name="snap", epochs=8, cycles=2, **common
                ),
                "trained apart": independent.Config(name="apart", epochs=8, runs=2, seed=1, **common),
            }
            known = lineage.marks(base)
            for name, config in others.items():
                version = {fge.Config: fge, snapshot.Config: snapshot}.get(type(config), independent).run(config)
                given = [found[0]] if "tuned" in name else found
                # Of a fine-tuned ensemble the first member is the given network itself.
                new = states(version)[1:] if "tuned" in name else states(version)
                distance, tensor = least(given, new)
                related = lineage.related(known, lineage.marks(version))
                rows.append([network, name, f"{distance:.2g} ({tensor})", "yes" if related else "no"])
        print(tabulate(rows, ["network", "other network", "least distance", "related"], tablefmt="pipe"))
        print(f"near: less than {lineage.NEAR}")


if __name__ == "__main__":
    main()
