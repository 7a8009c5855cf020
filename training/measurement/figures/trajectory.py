"""Rate, test error and distance from the start along a run that collected members (Garipov et al. 2018, figure 3).

The run is trained once more, with the same result bit for bit on a CPU, because weights between members are not stored.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models_store.store import Version
from training.config import Config
from training.errors import ConfigError
from training.geometry.vertices import coordinates
from training.measurement.probing import Probe, Subset
from training.measurement.report import Report
from training.optimisation.loop import Leg
from training.optimisation.session import Session
from training.runs import PREFIXED, Run, load_weights, save_state


def measure(
    version: Version, config: type[Config], plan: Callable[..., Any], each_cycle: int, subset: Subset, folder: Path
) -> Report:
    """Train again, measure `each_cycle` networks in each cycle, and write METHOD-run.csv and .png into `folder`.

    Args:
        version: an ensemble whose members were collected along one training, as by FGE, snapshots or cSG-MCMC.
        config: the Config of the method's command.
        plan: the method's plan.
        each_cycle: number of networks measured between two members.
        subset: number of images that they are measured on.
        folder: where the files are written.

    Raises:
        ConfigError: the training began with given weights, or its members do not lie along one run.
    """
    options = _options(version, config)
    session = Session.open(config(**options))
    steps = session.steps_per_epoch
    key = {**session.config.deciding(), "each_cycle": each_cycle}
    with Run.open("landscape", key, {"data": session.data.fingerprint}, fresh=False) as run:
        start = {f"network.{name}": tensor for name, tensor in session.network.state_dict().items()}
        save_state(run.start_file("fresh-0"), start, PREFIXED)
        legs, first = _one_run(plan(session.config, run, steps).legs, version)
        measured = [_also(leg, each_cycle) if index >= first else leg for index, leg in enumerate(legs)]
        session.train(run, measured)
        origin = load_weights(legs[first].start or run.start_file("fresh-0"))
        parameters = [name for name, _ in session.network.named_parameters()]
        rows: list[dict[str, Any]] = []
        spent = sum(leg.iterations for leg in legs[:first])
        for index in range(first, len(legs)):
            leg = legs[index]
            at = [*((0,) if index == first else ()), *measured[index].collect]
            files = [None] * (index == first) + [
                run.vertex_file(index, number) for number in range(len(measured[index].collect))
            ]
            for iteration, file in zip(at, files, strict=True):
                state = origin if file is None else load_weights(file)
                probe = Probe(
                    session.network, session.data_on_device, [state], session.config.weight_decay, subset,
                    session.fabric.device,
                )  # fmt: skip
                positions = coordinates([origin, state], parameters)
                rows.append(
                    {
                        "iteration": spent + iteration,
                        "epoch": (spent + iteration) / steps,
                        "rate": leg.rate(max(iteration, 1)),
                        "test_error": probe.at(np.ones(1)).test_error,
                        "distance": float(np.linalg.norm(positions[1] - positions[0])),
                        "member": iteration in leg.collect,
                    }
                )
            spent += leg.iterations
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{config.method}-run.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    report = Report({"of": version.name, "measured_on": subset.describe(session.data), "rows": rows})
    report.figures[f"{config.method}-run"] = plot(rows, version.name)
    report.save_figures(folder)
    return report


def _options(version: Version, config: type[Config]) -> dict[str, Any]:
    recorded = version.manifest.provenance.config
    names = {field.name for field in dataclasses.fields(config)}
    if any(recorded.get(name) for name in ("init", "base")):
        raise ConfigError(
            f"{version.name} began with given weights, which are not stored. Give an ensemble that was trained from new initial weights."
        )
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in recorded.items()
        if key in names and value != []
    }


def _one_run(legs: Sequence[Leg], version: Version) -> tuple[list[Leg], int]:
    """The legs up to the end of the first run, and the index of the first one that collects members."""
    collecting = [index for index, leg in enumerate(legs) if leg.collect]
    first = collecting[0]
    rest = itertools.takewhile(lambda leg: leg.collect and leg.start is None, legs[first + 1 :])
    chosen = [*legs[: first + 1], *rest]
    if sum(len(leg.collect) for leg in chosen) < 2 or any(leg.weight_sets > 1 for leg in chosen):
        raise ConfigError(
            f"The members of {version.name} do not lie along one run. Give an ensemble of FGE, snapshots or cSG-MCMC, or three networks, NAME/INDEX each."
        )
    return chosen, first


def _also(leg: Leg, each_cycle: int) -> Leg:
    """The leg, collecting `each_cycle` weight sets for each member."""
    gap = min((later - earlier for earlier, later in itertools.pairwise(leg.collect)), default=leg.iterations)
    every = max(1, gap // each_cycle)
    collect = tuple(sorted({*range(every, leg.iterations + 1, every), *leg.collect}))
    return dataclasses.replace(leg, collect=collect)


def plot(rows: list[dict[str, Any]], title: str) -> Figure:
    """Rate, test error and distance from the start against epochs; circles are members."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    epoch = np.array([row["epoch"] for row in rows])
    members = np.array([row["member"] for row in rows])
    panels = (
        ("rate", 1, "learning rate"),
        ("test_error", 100, "test error, %"),
        ("distance", 1, "distance from the first\nnetwork (L2 of weights)"),
    )
    for axes, (name, scale, label) in zip(figure.subplots(3, 1, sharex=True), panels, strict=True):
        values = np.array([row[name] for row in rows]) * scale
        axes.plot(epoch, values, linewidth=1, label="along the run")
        axes.plot(epoch[members], values[members], "o", label="members")
        axes.set(ylabel=label, ylim=(0, 1.05 * values.max() or 1))
        axes.grid(alpha=0.3)
        if name == "rate":
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False)
    figure.supxlabel("epochs of training")
    figure.suptitle(title)
    return figure
