"""Rate, test error and distance from the start along the cycles of an FGE run (Garipov et al. 2018, figure 3).

They are trained once more, bit for bit the same on a CPU, because weights between members are not kept.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models_store.store import Version
from training import data, networks
from training.errors import ConfigError
from training.geometry.vertices import coordinates
from training.measurement.probing import Probe, Subset
from training.optimisation import hardware, loop
from training.optimisation.schedules import fge_rate
from training.runs import PREFIXED, Run, load_weights, save_state


def measure(
    version: Version, make: type[Any], plan: Callable[..., Any], each_cycle: int, subset: Subset, folder: Path
) -> dict[str, Any]:
    """Train the cycles again, look at them `each_cycle` times a cycle, and write fge-run.csv and fge-run.png into `folder`.

    Args:
        version: an FGE ensemble.
        make: the Config of FGE's command.
        plan: its plan.
        each_cycle: points measured in each cycle.
        subset: images that they are measured on.
        folder: for what is written.

    Raises:
        ConfigError: the ensemble began from given weights.
    """
    kept = dict(version.manifest.provenance.config)
    names = {f.name for f in dataclasses.fields(make)}
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in kept.items() if key in names
    }
    options["init"] = tuple(Path(file) for file in options.get("init", ()))
    if options["init"]:
        raise ConfigError(
            f"{version.name} began from given weights, which are not kept; show an ensemble with pre-training."
        )
    trained = make(**options)
    found = data.load(trained.data_options(), lambda line: None)
    steps = loop.iterations_per_epoch(found, trained.batch_size)
    cycle, _ = trained.cycles(steps)
    fabric = hardware.launch(trained)
    placed = data.on_device(found, fabric.device)
    every = max(1, cycle // each_cycle)
    with Run.open(
        "landscape", {**trained.deciding(), "every": every}, {"data": found.fingerprint}, fresh=False
    ) as this_run:
        loop.initialise(trained.seed, 0)
        network = networks.build(trained.network, len(found.classes), found.shape, trained.network_kwargs())
        start = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        save_state(this_run.start_file("fresh-0"), start, PREFIXED)
        pretraining, cycles, *_ = plan(trained, this_run, steps).legs
        looked = tuple(sorted({*range(every, cycles.iterations + 1, every), *cycles.collect}))
        legs = [pretraining, dataclasses.replace(cycles, collect=looked)]
        loop.train(trained, fabric, this_run, network, placed, legs)
        origin = load_weights(cycles.start)  # pyright: ignore[reportArgumentType]
        files = [this_run.vertex_file(1, index) for index in range(len(looked))]
        rows: list[dict[str, float]] = []
        parameters = [name for name, _ in network.named_parameters()]
        for iteration, file in zip((0, *looked), (None, *files), strict=True):
            state = origin if file is None else load_weights(file)
            probe = Probe(network, placed, [state], trained.weight_decay, subset, fabric.device)
            positions = coordinates([origin, state], parameters)
            rows.append(
                {
                    "iteration": iteration,
                    "epoch": iteration / steps,
                    "rate": fge_rate(max(iteration, 1), cycle, trained.alpha_1, trained.alpha_2),
                    "test_error": probe.at(np.ones(1)).test_error,
                    "distance": float(np.linalg.norm(positions[1] - positions[0])),
                    "member": iteration in cycles.collect,
                }
            )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fge-run.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, version.name, folder / "fge-run.png")
    return {"of": version.name, "measured_on": subset.describe(found), "rows": rows}


def plot(rows: list[dict[str, float]], title: str, file: Path) -> None:
    """Rate, test error and distance from the start against epochs; circles are members."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 7), layout="constrained")
    epoch = np.array([row["epoch"] for row in rows])
    members = np.array([bool(row["member"]) for row in rows])
    for axes, name in zip(figure.subplots(3, 1, sharex=True), ("rate", "test_error", "distance"), strict=True):
        values = np.array([row[name] for row in rows])
        axes.plot(epoch, values, linewidth=1)
        axes.plot(epoch[members], values[members], "o")
        axes.set(ylabel=name.replace("_", " "))
    figure.supxlabel("epochs of the cycles")
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
