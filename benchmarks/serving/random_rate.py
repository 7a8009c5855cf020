"""What a network of its own for each query costs the service: `random` over a bank beside one fixed member, at the same load.

    python -m benchmarks.serving.random_rate NAME [--rounds 5] [--seconds 5] [--connections 1 8 64]      NAME: a published preresnet8 with a bank, 28 × 28

Needs `wrk`. One server has both: NAME under a policy of `random`, and an ensemble of one such network that shows as much (two digits, no uncertainty); they
take turns, in another order every round, with 256 bodies one after the other. Then `keyed`, batches of 32 images, and a pool that holds a quarter of the bank and
renews itself. Medians over the rounds, of ratios within a round, go to benchmarks/results/random_rate.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from tabulate import tabulate

from benchmarks.serving import throughput
from benchmarks.serving.throughput import Arm, running, wrk
from models_store.manifest import Draft
from models_store.store import Store, Version
from service.inference.modes import pool

BODIES = 256
RESULT = Path(__file__).parents[1] / "results/random_rate.md"


def prepare(root: Path, name: str) -> tuple[Version, Path]:
    """A store with the ensemble as `path`, and one network by itself; the folder of that one."""
    found, store = Store().resolve(name), Store(root)
    with store.staging("path") as staged:
        for file in found.manifest.files:
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.folder / file, staged / file)
        fields = {key: getattr(found.manifest, key) for key in Draft.model_fields}
        path = store.publish("path", Path(staged), Draft(**fields))
    # Not one of path's: that would be closed.
    return path, throughput.publish(root, 1)


def bodies(folder: Path, batch: int, shape: tuple[int, int, int]) -> tuple[Path, np.ndarray]:
    """A script for wrk that sends BODIES npy bodies in turn, kept as files 0, 1, …; the images of the first."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (BODIES, batch, *shape)).astype(np.float32) / 255
    for number, images in enumerate(pixels):
        with (folder / str(number)).open("wb") as file:
            np.save(file, images)
    script = folder / "npy.lua"
    script.write_text(
        f"""local requests, turn = {{}}, 0
function init()
  for number = 0, {BODIES - 1} do
    local file = io.open("{folder}/" .. number, "rb")
    requests[number] = wrk.format("POST", nil, {{["Content-Type"] = "application/x-npy"}}, file:read("*a"))
    file:close()
  end
end
function request()
  turn = (turn + 1) % {BODIES}
  return requests[turn]
end
"""
    )
    return script, pixels[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 64])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path, member = prepare(root / "store", args.name)
        size = pool.source(path, "cpu")
        rows = []
        policies = (
            ("whole bank", ["random", "keyed"], 2**40),
            ("a quarter of it", ["random"], size.count // 4 * size.bytes_each),
        )
        for label, modes, held in policies:
            rows += measure(root, path, member, held, label, modes, args)
    headers = [
        "pool",
        "images",
        "connections",
        "mode",
        "requests/s",
        "÷ one member",
        "range",
        "p99, ms",
        "÷ one member",
    ]
    text = [
        "# A network of its own for each query",
        f"`python -m benchmarks.serving.random_rate {args.name} --rounds {args.rounds} --seconds {args.seconds}`, {len(os.sched_getaffinity(0))} cores shared with "
        f"wrk; npy bodies; a bank of {size.count} networks, {size.bytes_each / 2**20:.2f} MiB each. Medians over rounds; ratios are within a round.",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
    ]
    RESULT.write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


def measure(
    root: Path, path: Version, member: Path, held: int, label: str, modes: list[str], args: argparse.Namespace
) -> list[list[str]]:
    # What one member shows is what `random` shows by default.
    policies = {
        "path": {"modes": modes},
        throughput.NAME: {"modes": ["average"], "probabilities": 2, "uncertainty": False, "members": False},
    }
    environment = {
        # A listener of its own, so that both are observed: a defended ensemble has no histograms on the public one.
        "MODEPATH_METRICS_PORT": str(throughput.free_port()),
        "MODELS_STORE": str(root / "store"),
        "MODEPATH_POOL_BYTES": str(held),
        "MODEPATH_POLICIES": json.dumps(policies),
        "MODEPATH_DEFAULT": throughput.NAME,
    }
    arm = Arm("modepath", ["bentoml", "serve", "--port", "{port}"], environment)
    found: dict[tuple[int, int, str], list[dict[str, float]]] = {}
    asked = {"one member": f"ensemble={throughput.NAME}"} | {mode: f"ensemble=path&mode={mode}" for mode in modes}
    with running(arm) as (url, _):
        for batch in (1, 32):
            folder = root / f"{label}-{batch}"
            script, image = bodies(folder, batch, path.manifest.input.shape)
            expected = throughput.expected(member, image[:1]).round(2)
            throughput.check(url, folder / "0", "npy", "ours", expected)
            for turn in range(args.rounds):
                for connections in args.connections if batch == 1 else (8,):
                    order = list(asked)[turn % len(asked) :] + list(asked)[: turn % len(asked)]
                    for mode in order:
                        wrk(f"{url}?{asked[mode]}", script, connections, 1)
                        cell = wrk(f"{url}?{asked[mode]}", script, connections, args.seconds)
                        found.setdefault((batch, connections, mode), []).append(cell)
                        print(label, batch, connections, mode, cell, flush=True)
    rows = []
    for (batch, connections, mode), cells in found.items():
        beside = found[batch, connections, "one member"]
        rates = [mine["rate"] / its["rate"] for mine, its in zip(cells, beside, strict=True)]
        tails = [mine["p99"] / its["p99"] for mine, its in zip(cells, beside, strict=True)]
        rows.append(
            [
                label, str(batch), str(connections), mode, f"{np.median([cell['rate'] for cell in cells]):.0f}", f"{np.median(rates):.2f}",
                f"{min(rates):.2f} … {max(rates):.2f}", f"{np.median([cell['p99'] for cell in cells]):.1f}", f"{np.median(tails):.2f}",
            ]
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
