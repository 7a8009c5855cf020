"""The loss around published networks (Garipov et al. 2018, figures 1 and 3).

Of a curve with one bend, or of three networks: train loss and test error over the plane through the three weight sets.
Of an FGE ensemble: rate, test error and distance from the start along its cycles; they are trained once more, bit for bit
the same on a CPU, because weights between members are not kept.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from models_store.store import Store, Version
from training import checkpoint, data, door, fge, hardware, loop, networks
from training.errors import ConfigError
from training.geometry import coefficients
from training.geometry.coefficients import Coefficients
from training.geometry.vertices import gram
from training.probing import Kept, Probe, Subset, open_probe
from training.runs import PREFIXED, Run, load_weights, save_state
from training.schedules import fge_rate


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to look at."""

    of: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A curve or an FGE ensemble, NAME[@VERSION]; or three networks, NAME[@VERSION]/INDEX each, of one architecture."""
    grid: int = 21
    """Points on each side of the plane."""
    margin: float = 0.25
    """How far the plane goes beyond the three, as a share of their extent."""
    train_images: int | None = 5000
    """Train loss on so many training images; said in the output."""
    test_images: int | None = None
    """Test error on so many test images."""
    bn_images: int = 2048
    """Clean training images on which batch norm is re-estimated at every point."""
    each_cycle: int = 10
    """FGE: how often a cycle is looked at."""
    output: Path | None = None
    """Folder for the tables and figures (default: evaluation/NAME-VERSION)."""

    def __post_init__(self) -> None:
        if self.grid < 2 or self.each_cycle < 2:
            raise ConfigError("--grid and --each-cycle are at least 2.")
        if len(self.of) not in (1, 3):
            raise ConfigError(f"Give one ensemble, or three networks; got {len(self.of)} names.")


@dataclass(frozen=True)
class Plane:
    """The plane through three weight sets, with the coordinates of the paper (footnote 1), in units of the weights."""

    corners: NDArray[np.float64]  # (3, 2)

    @classmethod
    def through(cls, products: NDArray[np.float64]) -> Plane:
        """From the inner products of the three, (3, 3).

        Raises:
            ConfigError: they lie on one line.
        """
        edge = np.array([[-1, 1, 0], [-1, 0, 1]], np.float64)  # w2 − w1 and w3 − w1
        inner = edge @ products @ edge.T
        length = np.sqrt(inner[0, 0])
        along = inner[0, 1] / length if length > 0 else 0.0
        across = np.sqrt(max(inner[1, 1] - along**2, 0))
        if not across > 1e-6 * max(length, np.sqrt(inner[1, 1])):
            raise ConfigError("The three networks lie on one line, so there is no plane through them.")
        return cls(np.array([[0, 0], [length, 0], [along, across]]))

    def coefficients(self, places: NDArray[np.float64]) -> Coefficients:
        """Of points (N, 2) over the three: (N, 3), rows sum to 1."""
        third = places[:, 1] / self.corners[2, 1]
        second = (places[:, 0] - third * self.corners[2, 0]) / self.corners[1, 0]
        return np.stack([1 - second - third, second, third], axis=1)

    def axes(self, grid: int, margin: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """X and y of a grid over the three and beyond."""
        low, high = self.corners.min(axis=0), self.corners.max(axis=0)
        room = margin * (high - low)
        x, y = (np.linspace(low[i] - room[i], high[i] + room[i], grid) for i in range(2))
        return x, y


def run(config: Config) -> dict[str, Any]:
    """Measure, print where it lies, and return what the JSON holds."""
    store = Store()
    if len(config.of) == 3:
        found = [checkpoint.find(reference, store) for reference in config.of]
        if (version := found[0].version) is None:
            raise ConfigError(f"{config.of[0]} is no published network; give NAME[@VERSION]/INDEX.")
        return plane(config, version, [one.file for one in found], None)
    version = store.resolve(config.of[0])
    if version.manifest.method == fge.Config.method:
        return along_fge(config, version)
    geometry = version.manifest.geometry
    if geometry is None or geometry.shape not in ("bezier", "polychain") or len(geometry.components[0]) != 3:
        raise ConfigError(
            f"{version.name} is neither a curve with one bend nor an FGE ensemble; give three networks, NAME/INDEX each."
        )
    start, bend, end = (version.folder / geometry.vertices[i] for i in geometry.components[0])
    # Over (start, end, bend), so that the ends lie on the horizontal axis.
    path = coefficients.curve(geometry.shape, np.linspace(0, 1, 101), 1)[:, [0, 2, 1]]  # pyright: ignore[reportArgumentType]
    return plane(config, version, [start, end, bend], path)


def plane(config: Config, version: Version, files: list[Path], path: Coefficients | None) -> dict[str, Any]:
    """Figure 1: plane.csv, plane.json and plane.png."""
    subset = Subset(config.train_images, config.test_images, config.bn_images)
    probe, found = open_probe(version, files, subset, lambda line: None)
    flat = Plane.through(probe.gram)
    x, y = flat.axes(config.grid, config.margin)
    places = np.stack([axis.ravel() for axis in np.meshgrid(x, y)], axis=1)
    folder = _folder(config, version)
    question = {"of": config.of, "files": version.manifest.files, "subset": dataclasses.asdict(subset)}
    kept = Kept(folder / "plane.jsonl", question)
    rows = flat.coefficients(places)
    values = kept.measure(rows.tolist(), lambda row: probe.at(np.array(row)).record(), "plane")
    with (folder / "plane.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "c1", "c2", "c3", *values[0]])
        writer.writerows(
            [*place, *row, *value.values()] for place, row, value in zip(places, rows, values, strict=True)
        )
    report = {
        "of": list(config.of),
        "measured_on": subset.describe(found),
        "x": x.tolist(),
        "y": y.tolist(),
        "corners": flat.corners.tolist(),
        "path": (path @ flat.corners).tolist() if path is not None else None,
        **{
            name: np.array([value[name] for value in values]).reshape(len(y), len(x)).tolist()
            for name in ("train_loss", "test_error")
        },
    }
    (folder / "plane.json").write_text(json.dumps(report) + "\n")
    plot_plane(report, folder / "plane.png")
    print(f"{report['measured_on']}\nwritten to {folder}")
    return report


def plot_plane(report: dict[str, Any], file: Path) -> None:
    """Contours of train loss and test error; crosses are the three networks, the line is the path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    x, y, corners = (np.array(report[name]) for name in ("x", "y", "corners"))
    for axes, (name, label, scale) in zip(
        figure.subplots(1, 2),
        [("train_loss", "train loss (L2 included)", 1), ("test_error", "test error, %", 100)],
        strict=True,
    ):
        values = np.array(report[name]) * scale
        # Levels close together where the valley is, as the paper draws them.
        levels = values.min() + (values.max() - values.min()) * np.linspace(0, 1, 16) ** 2.5
        drawn = axes.contourf(x, y, values, levels=np.unique(levels), cmap="viridis_r")
        figure.colorbar(drawn, ax=axes, format="%.3g")
        if report["path"] is not None:
            axes.plot(*np.array(report["path"]).T, "k--", linewidth=1)
        axes.plot(*corners.T, "kX", markersize=9)
        axes.set(title=label, aspect="equal")
    figure.suptitle(", ".join(report["of"]))
    figure.savefig(file, dpi=150)


def along_fge(config: Config, version: Version) -> dict[str, Any]:
    """Figure 3: fge-run.csv and fge-run.png."""
    kept = dict(version.manifest.provenance.config)
    names = {f.name for f in dataclasses.fields(fge.Config)}
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in kept.items() if key in names
    }
    options["init"] = tuple(Path(file) for file in options.get("init", ()))
    if options["init"]:
        raise ConfigError(
            f"{version.name} began from given weights, which are not kept; show an ensemble with pre-training."
        )
    trained = fge.Config(**options)
    found = data.load(trained.data_options(), lambda line: None)
    steps = loop.iterations_per_epoch(found, trained.batch_size)
    cycle, _ = trained.cycles(steps)
    fabric = hardware.launch(trained)
    placed = data.on_device(found, fabric.device)
    every = max(1, cycle // config.each_cycle)
    with Run.open(
        "landscape", {**trained.deciding(), "every": every}, {"data": found.fingerprint}, fresh=False
    ) as this_run:
        loop.initialise(trained.seed, 0)
        network = networks.build(trained.network, len(found.classes), found.shape, trained.network_kwargs())
        start = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        save_state(this_run.start_file("fresh-0"), start, PREFIXED)
        pretraining, cycles, *_ = fge.plan(trained, this_run, steps).legs
        looked = tuple(sorted({*range(every, cycles.iterations + 1, every), *cycles.collect}))
        legs = [pretraining, dataclasses.replace(cycles, collect=looked)]
        loop.train(trained, fabric, this_run, network, placed, legs)
        origin = load_weights(cycles.start)  # pyright: ignore[reportArgumentType]
        files = [this_run.vertex_file(1, index) for index in range(len(looked))]
        subset = Subset(config.train_images, config.test_images, config.bn_images)
        rows: list[dict[str, float]] = []
        parameters = [name for name, _ in network.named_parameters()]
        for iteration, file in zip((0, *looked), (None, *files), strict=True):
            state = origin if file is None else load_weights(file)
            probe = Probe(network, placed, [state], trained.weight_decay, subset, fabric.device)
            products = gram([origin, state], parameters)
            rows.append(
                {
                    "iteration": iteration,
                    "epoch": iteration / steps,
                    "rate": fge_rate(max(iteration, 1), cycle, trained.alpha_1, trained.alpha_2),
                    "test_error": probe.at(np.ones(1)).test_error,
                    "distance": float(np.sqrt(max(products[0, 0] + products[1, 1] - 2 * products[0, 1], 0))),
                    "member": iteration in cycles.collect,
                }
            )
    folder = _folder(config, version)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fge-run.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot_fge(rows, version.name, folder / "fge-run.png")
    print(f"{subset.describe(found)}\nwritten to {folder}")
    return {"of": version.name, "rows": rows}


def plot_fge(rows: list[dict[str, float]], title: str, file: Path) -> None:
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


def _folder(config: Config, version: Version) -> Path:
    return config.output or Path("evaluation") / version.name.replace("@", "-")


if __name__ == "__main__":
    door.main(Config, run, __doc__)
