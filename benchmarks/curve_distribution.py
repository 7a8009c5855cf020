"""A distribution over curves: SWAG over the bend between two networks (Benton et al. 2021, section 4.1), beside SWAG around a network.

    python -m benchmarks.curve_distribution      trains what is missing, prints and keeps results/curve_distribution.md

preresnet8 on 10 000 images of Fashion-MNIST; two networks of 20 epochs; then 40 epochs for the Gaussian over the bend (20 of them at its constant
rate), or 20 at the constant rate around each of the two networks. 30 networks are drawn: in the first case each is a point, at a t of its own, of a curve
of its own. Cost in plain epochs, the two networks included. Seeds 0, 1, 2; test split; temperatures from validation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tabulate import tabulate

from benchmarks.comparison import spent
from models_store.runtime import EnsembleSession, in_batches
from models_store.store import Version
from models_store.uncertainty import softmax
from training import data, independent, swag, temperature
from training.config import data_options
from training.evaluate import pairwise_disagreement
from training.metrics import accuracy, score

RESULTS = Path(__file__).parent / "results"
COMMON = {"dataset": "fashion-mnist", "network": "preresnet8", "limit": 10_000, "activate": False}
SEEDS = (0, 1, 2)


def versions(seed: int) -> dict[str, Version]:
    ends = independent.run(independent.Config(name=f"bends-ends-{seed}", seed=seed, epochs=20, runs=2, **COMMON))
    first, second = f"{ends.name}/0", f"{ends.name}/1"
    common = {"seed": seed, **COMMON}
    over = swag.run(swag.Config(name=f"bends-over-{seed}", endpoints=(first, second), epochs=40, start=0.5, **common))
    # As many collections, and both networks: 20 epochs around each.
    around = swag.run(
        swag.Config(name=f"bends-around-{seed}", init=(Path(first), Path(second)), epochs=20, samples=15, **common)
    )
    return {"the two ends": ends, "SWAG over the bend": over, "SWAG around both ends": around}


def measure(version: Version) -> dict[str, float]:
    splits = data.load(data_options(version.manifest.provenance.config), lambda line: None)
    session = EnsembleSession(version.folder, version.manifest)
    (validation, known), (test, labels) = data.as_arrays(splits.validation), data.as_arrays(splits.test)
    logits, own = in_batches(session, test), in_batches(session, validation)
    weights = np.full(len(logits), 1 / len(logits))
    errors = [1 - accuracy(one, labels) for one in logits]
    apart = pairwise_disagreement(logits)
    average = score(np.tensordot(weights, softmax(logits, temperature.fit(own, known, weights)), 1), labels)
    beside = 40.0 if version.manifest.method == "swag" else 0.0
    return {
        "cost": spent(version) + beside,
        "networks": len(logits),
        "mean error, %": 100 * float(np.mean(errors)),
        "worst": 100 * max(errors),
        "disagreement, %": 100 * float(apart[np.triu_indices(len(apart), 1)].mean()),
        "average: error": 100 * (1 - average.accuracy),
        "NLL": average.nll,
    }  # fmt: skip


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        for name, version in versions(seed).items():
            found.setdefault(name, []).append(measure(version))
    columns = list(next(iter(found.values()))[0])
    body = [
        [name, *(f"{np.mean([row[c] for row in rows]):.3f} ± {np.std([row[c] for row in rows], ddof=1):.3f}" for c in columns)]
        for name, rows in found.items()
    ]  # fmt: skip
    text = "\n".join(
        [
            "# A distribution over curves",
            "",
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            tabulate(body, ["", *columns], tablefmt="github", disable_numparse=True),
            "",
        ]
    )
    (RESULTS / "curve_distribution.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
