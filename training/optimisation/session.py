"""What every training needs before its first step: a device, a data set, and a network with seeded initial weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from lightning_fabric import Fabric
from torch import nn

from training import data, logger, networks
from training.config import Config
from training.data import Data
from training.networks import partial
from training.optimisation import hardware, loop
from training.optimisation.loop import Leg
from training.runs import Run


@dataclass(frozen=True)
class Session:
    """A configured training. Its network is the first of a run: `initialised(0)`."""

    config: Config
    fabric: Fabric
    data: Data  # as loaded; training moves it to the device
    network: nn.Module

    @classmethod
    def open(cls, config: Config) -> Self:
        """Launch the processes, load the data and build the network.

        Raises:
            DataError, ImportStringError: the data set is unknown or malformed.
            NetworkError: the network is unknown, or cannot be built.
        """
        fabric = hardware.launch(config)
        loaded = data.load(config.data_options())
        for note in loaded.notes:
            logger.info(note)
        for warning in loaded.warnings:
            logger.warning(warning)
        found = cls(config, fabric, loaded, _build(config, loaded, 0))
        if config.train or config.freeze:
            logger.info(f"{partial.trained_share(found.network):.2%} of the parameters are trained; the rest is frozen")
        return found

    @classmethod
    def of(cls, config: Config, loaded: Data) -> Self:
        """A session on data that was loaded elsewhere; raises as `open` does."""
        return cls(config, hardware.launch(config), loaded, _build(config, loaded, 0))

    def initialised(self, number: int = 0) -> nn.Module:
        """A new network with the initial weights of the `number`-th network of a run."""
        return _build(self.config, self.data, number)

    @property
    def steps_per_epoch(self) -> int:
        """Number of iterations in an epoch."""
        return loop.iterations_per_epoch(self.data, self.config.batch_size)

    @functools.cached_property
    def data_on_device(self) -> Data:
        """The data, on the device if it fits there."""
        return data.on_device(self.data, self.fabric.device)

    def train(self, run: Run, legs: Sequence[Leg]) -> float:
        """Train all legs, resuming after the last finished epoch of the run. Returns seconds; see loop.train."""
        return loop.train(self.config, self.fabric, run, self.network, self.data_on_device, list(legs))


def _build(config: Config, loaded: Data, number: int) -> nn.Module:
    loop.initialise(config.seed, number)
    network = networks.build(config.network, len(loaded.classes), loaded.input, config.network_kwargs())
    partial.freeze(network, config.train, config.freeze)
    return network
