"""Ensembles at equal cost: independent networks, snapshots, FGE and curves at 1, 2 and 3 budgets, with and without temperature.

    python -m benchmarks.budgets            train what is missing, then print and keep the tables (results/budgets.md)
    python -m benchmarks.budgets --table    the tables from what there is

Fixed beforehand, for all methods alike: preresnet8 on all of Fashion-MNIST, B = 10 epochs, the data set's own augmentation,
rate 0.1, weight decay 3e-4, seeds 0, 1, 2. FGE with the paper's shares and rates (80 % plain, 0.05 to 5e-4, 6 members a run),
snapshots with 5 cycles a run. Nothing was searched. The curve joins the first two independent networks and is trained for one budget, so that it costs
3B in all; 6 equally spaced points of it are averaged. Batch norm is re-estimated for every network (doors do that). Doors resume, so this does too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from models_store.runtime import EnsembleSession, in_batches
from models_store.store import Store, Version
from models_store.uncertainty import Floats, softmax
from training import curve, data, fge, independent, snapshot, temperature
from training.metrics import score

SEEDS = (0, 1, 2)
B = 10
COMMON = {"dataset": "fashion-mnist", "network": "preresnet8", "epochs": B, "activate": False}
RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "budgets.jsonl"
SCORES = ("accuracy", "nll", "ece")


@dataclass(frozen=True)
class Arm:
    """Some members of a published version, averaged."""

    method: str
    budgets: int
    version: Callable[[int], Version]  # of the seed
    members: slice


def trained(door, seed: int, **options) -> Version:
    name = f"budgets-{options.pop('name', door.Config.method)}-{seed}"
    return door.run(door.Config(name=name, seed=seed, **COMMON, **options))


def _independent(seed: int) -> Version:
    return trained(independent, seed, runs=3)


def _curve(seed: int) -> Version:
    ends = _independent(seed)
    return trained(curve, seed, endpoints=tuple(f"{ends.name}/{i}" for i in (0, 1)), bank=0)


def _snapshot(seed: int) -> Version:
    return trained(snapshot, seed, runs=3)


def _fge(seed: int) -> Version:
    return trained(fge, seed, runs=3)


ARMS = [
    *(Arm("independent", k, _independent, slice(0, k)) for k in (1, 2, 3)),
    *(Arm("snapshot, 5 a run", k, _snapshot, slice(0, 5 * k)) for k in (1, 2, 3)),
    *(Arm("FGE, 6 a run", k, _fge, slice(0, 6 * k)) for k in (1, 2, 3)),
    Arm("curve: its two ends", 2, _curve, slice(0, 6, 5)),
    Arm("curve: its middle alone", 3, _curve, slice(2, 3)),
    Arm("curve: 6 points", 3, _curve, slice(0, 6)),
]


def measure(seed: int) -> list[dict]:
    """Test scores of every arm of one seed."""
    logits: dict[str, tuple[Floats, Floats]] = {}
    rows = []
    splits = None
    for arm in ARMS:
        version = arm.version(seed)
        splits = splits or data.load(data_options(version), lambda line: None)
        (validation, known), (test, labels) = data.as_arrays(splits.validation), data.as_arrays(splits.test)
        if version.name not in logits:
            session = EnsembleSession(version.folder, version.manifest)
            logits[version.name] = in_batches(session, validation), in_batches(session, test)
        on_validation, on_test = (one[arm.members] for one in logits[version.name])
        weights = np.full(len(on_test), 1 / len(on_test))
        fitted = temperature.fit(on_validation, known, weights)
        row = {
            "method": arm.method,
            "budgets": arm.budgets,
            "seed": seed,
            "members": len(on_test),
            "temperature": fitted,
        }
        for name, t in (("plain", 1.0), ("fitted", fitted)):
            row[name] = score(np.tensordot(weights, softmax(on_test, t), 1), labels).model_dump()
        label = softmax(on_test).argmax(2)
        pairs = [(label[i] != label[j]).mean() for i in range(len(label)) for j in range(i)]
        row["disagreement"] = float(np.mean(pairs)) if pairs else None
        rows.append(row)
    return rows


def data_options(version: Version):
    from training.config import data_options

    return data_options(version.manifest.provenance.config)


def tables(rows: list[dict]) -> str:
    text = [__doc__.split("\n\n")[-1].strip(), ""]
    for which, title in (("plain", "Without temperature"), ("fitted", "With a temperature fitted on validation")):
        body = []
        for arm in ARMS:
            of_arm = [r for r in rows if (r["method"], r["budgets"]) == (arm.method, arm.budgets)]
            if not of_arm:
                continue
            cells = []
            for name in SCORES:
                values = np.array([r[which][name] for r in of_arm])
                spread = values.std(ddof=1) if len(values) > 1 else np.nan
                cells.append(f"{values.mean():.4f} ± {spread:.4f}")
            apart = [r["disagreement"] for r in of_arm if r["disagreement"] is not None]
            body.append(
                [arm.method, f"{arm.budgets}B", of_arm[0]["members"], *cells, f"{np.mean(apart):.4f}" if apart else ""]
            )
        headers = ["method", "cost", "members", *SCORES, "disagreement"]
        text += [
            f"## {title}: test split, mean and standard deviation over seeds {sorted({r['seed'] for r in rows})}",
            "",
        ]
        text += [tabulate(body, headers, tablefmt="github", disable_numparse=True), ""]
    return "\n".join(["# Ensembles at equal cost", "", *text])


def main() -> None:
    if "--table" not in sys.argv:
        for seed in SEEDS:
            if any(r["seed"] == seed for r in lines()):
                continue
            with LINES.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in measure(seed))
    text = tables(lines())
    (RESULTS / "budgets.md").write_text(text)
    print(text)


def lines() -> list[dict]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


if __name__ == "__main__":
    Store().check_writable()
    main()
