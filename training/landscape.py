"""Measures and draws the loss around published networks, as in the papers.

For a curve with one bend, or for three networks: train loss and test error over the plane through the three weight
sets. For an ensemble collected along one run (FGE, snapshots, cSG-MCMC): learning rate, test error and distance from
the start along that run. For simplexes: the loss over their faces, the whole complex in three dimensions, and the
volume by the number of vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from models_store.store import Store, Version
from training import command, csgmcmc, fge, logger, snapshot
from training.errors import ConfigError
from training.geometry import coefficients
from training.measurement.figures import plane, simplexes, trajectory
from training.measurement.probing import Subset
from training.measurement.report import Report
from training.runs import checkpoint

# Methods that collect members along a run.
RUNS = {module.Config.method: module for module in (csgmcmc, fge, snapshot)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the command."""

    of: Annotated[tuple[str, ...], tyro.conf.Positional]
    """What to measure: a published ensemble, NAME[@VERSION], of a curve with one bend, simplexes, FGE, snapshots or
    cSG-MCMC; or three networks of one architecture, NAME[@VERSION]/INDEX each."""
    grid: int = 21
    """Number of grid points on each side of a plane."""
    margin: float = 0.25
    """How far a plane extends beyond its three networks, as a share of their extent."""
    train_images: int | None = 5000
    """Number of training images on which the loss is measured; the output states it."""
    test_images: int | None = None
    """Number of test images on which the error is measured (default: all); the output states it."""
    bn_images: int = 2048
    """Number of training images, without augmentation, on which batch norm is re-estimated at every point."""
    each_cycle: int = 10
    """For ensembles collected along a run (FGE, snapshots, cSG-MCMC): number of measurements in each cycle."""
    face: tuple[str, ...] = ()
    """For simplexes: faces to draw, each as three vertices, for example 0,1,2 0,1,3 (default: the first three vertices
    of the first simplex)."""
    output: Path | None = None
    """Folder for the tables and figures (default: evaluation/NAME-VERSION)."""

    def __post_init__(self) -> None:
        if self.grid < 2 or self.each_cycle < 2:
            raise ConfigError("--grid and --each-cycle must be at least 2.")
        _ = self.faces
        if len(self.of) not in (1, 3):
            raise ConfigError(f"Give one ensemble, or three networks; got {len(self.of)} names.")

    @property
    def faces(self) -> list[list[int]]:
        """--face as lists of vertex numbers.

        Raises:
            ConfigError: a face does not have three different vertices.
        """
        faces = [[int(vertex) if vertex.isdecimal() else -1 for vertex in face.split(",")] for face in self.face]
        if wrong := [
            given for given, face in zip(self.face, faces, strict=True) if len(set(face)) != 3 or min(face) < 0
        ]:
            raise ConfigError(
                f"--face {wrong[0]}: a face has three different vertices, counted from 0, for example 0,1,2."
            )
        return faces


def run(config: Config) -> Report:
    """Measure, write tables and figures, log their folder, and return the content of the JSON file."""
    subset = Subset(config.train_images, config.test_images, config.bn_images)
    store = Store()
    if len(config.of) == 3:
        weights = [checkpoint.find(reference, store) for reference in config.of]
        if (version := weights[0].version) is None:
            raise ConfigError(f"{config.of[0]} is not a published network; give NAME[@VERSION]/INDEX.")
        files, path = [given.file for given in weights], None
        folder = _folder(config, version)
        report = plane.measure(list(config.of), version, files, path, config.grid, config.margin, subset, folder)
    else:
        version = store.resolve(config.of[0])
        folder = _folder(config, version)
        report = _of_ensemble(config, version, subset, folder)
    logger.info(f"{report['measured_on']}\nwritten to {folder}")
    return report


def _of_ensemble(config: Config, version: Version, subset: Subset, folder: Path) -> Report:
    geometry = version.manifest.geometry
    if geometry is None and (method := RUNS.get(version.manifest.method)):
        return trajectory.measure(version, method.Config, method.plan, config.each_cycle, subset, folder)
    if geometry is not None and geometry.shape in ("simplex", "complex"):
        return simplexes.measure(version, config.faces, config.grid, config.margin, subset, folder)
    if geometry is None or geometry.shape not in ("bezier", "polychain") or len(geometry.components[0]) != 3:
        raise ConfigError(
            f"{version.name} is neither a curve with one bend, nor a simplex, nor an ensemble collected along a run ({', '.join(RUNS)}). "
            "Give three networks, NAME/INDEX each."
        )
    start, bend, end = (version.folder / geometry.vertices[i] for i in geometry.components[0])
    # Over (start, end, bend), so that the ends lie on the horizontal axis.
    path = coefficients.curve(geometry.shape, np.linspace(0, 1, 101), 1)[:, [0, 2, 1]]  # pyright: ignore[reportArgumentType]
    return plane.measure(list(config.of), version, [start, end, bend], path, config.grid, config.margin, subset, folder)


def _folder(config: Config, version: Version) -> Path:
    return config.output or Path("evaluation") / version.name.replace("@", "-")


if __name__ == "__main__":
    command.main(Config, run, __doc__)
