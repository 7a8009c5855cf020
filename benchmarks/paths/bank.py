"""What a bank costs, and how many images its batch norm needs.

python -m benchmarks.paths.bank size NAME         files of a published bank in units of one weight set, beyond its vertices
python -m benchmarks.paths.bank wrn               the same for wrn-28-10: publishes wrn-bank, 256 untrained points on digits (15 minutes on a CPU; resumable)
python -m benchmarks.paths.bank images NAME       test NLL and error of points of a curve by the number of images for batch norm
python -m benchmarks.paths.bank speed NAME        a point's session: seconds to make, and its rate beside a member's
"""

from __future__ import annotations

import sys
import time

import numpy as np
from tabulate import tabulate

from models_store.bank import Bank
from models_store.graphs.runtime import MemberSession
from models_store.store import Store
from training import curve
from training.geometry import coefficients
from training.measurement.probing import Subset, open_probe

IMAGES = (128, 512, 1024, 2048, 4096, 8192, 16384, 54_000)


def size(name: str) -> None:
    version = Store().resolve(name)
    bank = Bank.load(version.folder / "bank")
    one = sum(stack[0].nbytes for stack in bank.vertices.values())
    total = sum(file.stat().st_size for file in (version.folder / "bank").iterdir())
    count = bank.coefficients.shape[1]
    print(
        f"{version.name}: {len(bank)} points, V = {count}: {total / 2**20:.1f} MiB = {total / one:.3f} weight sets of {one / 2**20:.1f} MiB, "
        f"V + {total / one - count:.3f}"
    )


def wrn() -> None:
    """What a bank weighs does not depend on how well it was trained; one step an end, and small images."""
    options = {"network": "wrn-28-10", "limit": 64, "batch_size": 64, "bn_images": 64, "epochs": 1, "activate": False}
    size(curve.run(curve.Config(name="wrn-bank", members=2, **options)).name)


def images(name: str) -> None:
    version = Store().resolve(name)
    geometry = version.manifest.geometry
    assert geometry is not None, "a curve is needed"
    files = [version.folder / geometry.vertices[i] for i in geometry.components[0]]
    rows = coefficients.curve(geometry.shape, np.array([0.0, 0.25, 0.5, 0.75, 1.0]), len(files) - 2)
    table = []
    for count in IMAGES:
        probe, _ = open_probe(version, files, Subset(train=128, bn=count))
        found = [probe.at(row) for row in rows]
        table.append(
            [
                count,
                *(f"{one.test_nll:.4f}" for one in found),
                f"{100 * np.mean([one.test_error for one in found]):.3f}",
            ]
        )
    headers = ["images", *(f"NLL at t = {t:g}" for t in (0, 0.25, 0.5, 0.75, 1)), "mean test error, %"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


def speed(name: str, rounds: int = 9, calls: int = 300) -> None:
    version = Store().resolve(name)
    bank = Bank.load(version.folder / "bank")
    began = time.perf_counter()
    sessions = [MemberSession(bank.template, threads=1, weights=bank.weights(p)) for p in range(min(32, len(bank)))]
    made = (time.perf_counter() - began) / len(sessions)
    member = MemberSession(version.folder / version.manifest.members[0].file, threads=1)
    image = np.random.default_rng(0).random((1, *version.manifest.input.shape), np.float32)
    ratios = []
    for _ in range(rounds):
        seconds = []
        for session in (sessions[0], member):
            session.logits(image)
            began = time.perf_counter()
            for _ in range(calls):
                session.logits(image)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    print(
        f"{version.name}: a point's session is made in {made * 1e3:.1f} ms; its time over a member's, batch 1: median "
        f"{np.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
    )


if __name__ == "__main__":
    {"size": size, "wrn": wrn, "images": images, "speed": speed}[sys.argv[1]](*sys.argv[2:])
