"""Ensembles side by side: some members of published versions, averaged, with and without a temperature, over several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from models_store.decisions import temperature
from models_store.graphs.runtime import EnsembleSession, in_batches
from models_store.store import Version
from models_store.uncertainty import Floats, softmax
from training import data
from training.config import data_options
from training.evaluate import pairwise_disagreement
from training.members.metrics import score

SCORES = ("accuracy", "nll", "ece")
Labelled = tuple[Floats, NDArray[np.int64]]  # images, labels


@dataclass(frozen=True)
class Arm:
    """Some members of a published version, averaged."""

    method: str
    version: Callable[[int], Version]  # of the seed
    members: slice
    share: float = 1.0  # of what the version's training cost: the part that these members needed
    beside: Callable[[int], float] = lambda seed: 0.0  # plain epochs of networks that were given to it


def spent(version: Version) -> float:
    """What its training cost, in plain epochs, without networks that were given."""
    found = version.manifest.provenance.epochs_spent
    assert found is not None, version.name
    return found


def measure(
    arms: Sequence[Arm], seed: int, shifted: Callable[[Labelled], dict[str, Labelled]] = lambda test: {}
) -> dict[str, Any]:
    """A row for each arm, in order; `shifted` gives further test sets by name, made from the test split."""
    logits: dict[str, dict[str, Floats]] = {}
    sets: dict[str, Labelled] = {}
    rows: list[dict[str, Any]] = []
    for arm in arms:
        version = arm.version(seed)
        if not sets:
            splits = data.load(data_options(version.manifest.provenance.config))
            test = data.as_arrays(splits.test)
            sets = {"validation": data.as_arrays(splits.validation), "test": test, **shifted(test)}
        if version.name not in logits:
            session = EnsembleSession(version.folder, version.manifest)
            logits[version.name] = {name: in_batches(session, images) for name, (images, _) in sets.items()}
        own = {name: values[arm.members] for name, values in logits[version.name].items()}
        count = len(own["test"])
        weights = np.full(count, 1 / count)
        fitted = temperature.fit(own["validation"], sets["validation"][1], weights)
        row: dict[str, Any] = {
            "method": arm.method,
            "members": count,
            "cost": round(arm.share * spent(version) + arm.beside(seed), 2),
            "temperature": fitted,
            "disagreement": float(pairwise_disagreement(own["test"])[np.triu_indices(count, 1)].mean()) if count > 1 else None,
        }  # fmt: skip
        for kind, t in (("plain", 1.0), ("fitted", fitted)):
            row[kind] = {
                name: score(np.tensordot(weights, softmax(own[name], t), 1), labels).model_dump()
                for name, (_, labels) in sets.items()
            }
        rows.append(row)
    return {"rows": rows}


def table(found: Sequence[dict[str, Any]], kind: str, sets: Sequence[str] = ("test",)) -> str:
    """Mean and standard deviation over what `measure` found for each seed; a score over several test sets is their mean."""
    body = []
    for of_seeds in zip(*(one["rows"] for one in found), strict=True):
        cells = []
        for name in SCORES:
            values = np.array([np.mean([row[kind][one][name] for one in sets]) for row in of_seeds])
            cells.append(f"{values.mean():.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""))
        first, apart = of_seeds[0], [row["disagreement"] for row in of_seeds if row["disagreement"] is not None]
        body.append([first["method"], f"{first['cost']:g}", first["members"], *cells])
        if len(sets) == 1:
            body[-1].append(f"{np.mean(apart):.4f}" if apart else "")
    headers = ["method", "cost, epochs", "members", *SCORES, *(["disagreement"] if len(sets) == 1 else [])]
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)
