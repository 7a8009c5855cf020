"""Fast geometric ensembling (Garipov et al. 2018, section 5): an ensemble for the cost of one network.

Most of the budget trains one network by the plain schedule; then a short cyclical rate moves it through the valley of
low loss, and the weights are collected wherever the rate is lowest. Each collected set of weights becomes a member.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from models_store.manifest import Origin
from models_store.store import Store, Version
from training import checkpoint, data, door, hardware, loop, networks, publication
from training.config import Config as BaseConfig
from training.errors import CheckpointError, ConfigError
from training.loop import Leg
from training.runs import Run, load_state, save_state
from training.schedules import fge_collections, fge_rate, plain_rate


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of FGE."""

    method: ClassVar[str] = "fge"

    pretrain: float = 0.8
    """Share of the budget for the plain schedule of the whole budget, cut there."""
    alpha_1: float = 0.05
    """The cycles' largest rate."""
    alpha_2: float = 5e-4
    """The cycles' smallest rate; members are collected exactly there."""
    members: int = 6
    """How many to collect after each start; their cycles fill the rest of the budget. --cycle overrides it."""
    cycle: float | None = None
    """Length of a cycle, in epochs (the paper: 2 to 4 at a budget of 200)."""
    starts: tuple[int, ...] = ()
    """Epochs of the pre-training whose checkpoints each start a share of the cycles (default: its last)."""
    init: tuple[Path, ...] = ()
    """Your own pretrained weights: the whole budget is cycles, and each given network is a member too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha_2 < self.alpha_1:
            raise ConfigError(f"0 < alpha_2 < alpha_1 is needed; got {self.alpha_2:g} and {self.alpha_1:g}.")
        if self.init and self.starts:
            raise ConfigError("--starts are epochs of the pre-training; with --init there is none.")
        if not self.init and not 0 < self.pretrain_epochs < self.epochs:
            raise ConfigError(
                f"--pretrain {self.pretrain:g} of {self.epochs} epochs leaves {self.pretrain_epochs} for pre-training and "
                f"{self.epochs - self.pretrain_epochs} for cycles; both need at least one epoch."
            )
        if self.members < 1 or (self.cycle is not None and self.cycle <= 0):
            raise ConfigError("--members must be at least 1 and --cycle positive.")
        if wrong := [epoch for epoch in self.starts if not 1 <= epoch <= self.pretrain_epochs]:
            raise ConfigError(f"--starts {wrong[0]} is no epoch of the pre-training (1 … {self.pretrain_epochs}).")

    @property
    def pretrain_epochs(self) -> int:
        """Epochs of the plain schedule."""
        return 0 if self.init else round(self.pretrain * self.epochs)

    def cycles(self, steps: int) -> tuple[int, tuple[int, ...]]:
        """Iterations in one cycle (even), and those after which members are collected, at `steps` an epoch.

        Raises:
            ConfigError: not one collection fits.
        """
        starts = len(self.init or self.starts or (0,))
        available = (self.epochs - self.pretrain_epochs) * steps // starts
        # The last collection, at half of the last cycle, is where the budget ends.
        exact = available / (self.members - 0.5) if self.cycle is None else self.cycle * steps
        cycle = max(2, 2 * round(exact / 2))
        while self.cycle is None and cycle > 2 and (self.members - 1) * cycle + cycle // 2 > available:
            cycle -= 2
        collect = fge_collections(available, cycle)
        if not collect:
            raise ConfigError(
                f"A cycle of {cycle / steps:g} epochs never reaches its middle in the {available / steps:g} epochs after each start; "
                "shorten --cycle, or give more --epochs."
            )
        return cycle, tuple(collect if self.cycle is not None else collect[: self.members])


def run(config: Config) -> Version:
    """Train, or go on training, and publish; a finished run is found and left alone."""
    store = Store()
    store.check_writable()
    fabric = hardware.launch(config)
    say = print if fabric.is_global_zero else (lambda line: None)
    found = data.load(config.data_options(), say)
    loop.initialise(config.seed)
    network = networks.build(config.network, len(found.classes), found.shape, config.network_kwargs())
    given = [_given(network, file) for file in config.init]
    if given and found.validation_cut:
        say(
            "warning: the validation images were set aside from the training images just now. If the given network was trained on "
            "them, the validation scores are too good and the temperature too low; let your data set bring a validation split."
        )
    depends_on = {"the data set": found.fingerprint, **{f"--init {file}": _digest(file) for file in config.init}}
    leader = fabric.is_global_zero
    with contextlib.ExitStack() as stack:
        with fabric.rank_zero_first():
            opened = Run.open(config.method, config.deciding(), depends_on, fresh=config.fresh, leader=leader)
            this_run = stack.enter_context(opened)
            for index, state in enumerate(given if leader else ()):
                save_state(this_run.start_file(f"init-{index}"), state)
        name = config.published_name
        if (done := store.find_run(name, this_run.identity)) is not None:
            say(f"already finished: this run published {name}@{done}. Nothing to do; --fresh trains anew.")
            return store.load(name, done)
        say(f"run {this_run.folder} on {hardware.describe(fabric)}")
        placed = data.on_device(found, fabric.device)
        legs = plan(config, this_run, loop.iterations_per_epoch(found, config.batch_size))
        seconds = loop.train(config, fabric, this_run, network, placed, legs)
        if leader:
            steps = loop.iterations_per_epoch(found, config.batch_size)
            publication.publish(
                store, config, this_run, network, placed, collected(config, this_run, legs, steps),
                device=fabric.device, described=hardware.describe(fabric), seconds=seconds,
                epochs_spent=sum(leg.iterations for leg in legs) / steps,
            )  # fmt: skip
        fabric.barrier()
        return store.load(name, store.find_run(name, this_run.identity))


def plan(config: Config, run: Run, steps: int) -> list[Leg]:
    """The legs of one run: pre-training, unless weights were given, and the cycles after each start."""
    cycle, collect = config.cycles(steps)
    starts = config.starts or (config.pretrain_epochs,)
    files = [
        run.start_file(f"init-{i}" if config.init else f"epoch-{starts[i]}") for i in range(len(config.init or starts))
    ]
    cycles = [
        Leg(
            label="cycles" if len(files) == 1 else f"cycles from {file.stem}",
            iterations=collect[-1],
            rate=lambda i: fge_rate(i, cycle, config.alpha_1, config.alpha_2),
            start=file,
            collect=collect,
        )
        for file in files
    ]
    if config.init:
        return cycles
    total = config.epochs * steps
    pretraining = Leg(
        label="pre-training",
        iterations=config.pretrain_epochs * steps,
        rate=lambda i: plain_rate(i, total, config.lr),
        keep=tuple(zip(starts, files, strict=True)),
    )
    return [pretraining, *cycles]


def collected(config: Config, run: Run, legs: list[Leg], steps: int) -> Iterator[publication.Point]:
    """The vertices in order of collection, each a path point of its own; given networks come first."""
    for index in range(len(config.init)):
        state = load_state(run.start_file(f"init-{index}"))
        yield {k.removeprefix("network."): v for k, v in state.items()}, Origin(cycle=0, epoch=0)
    spent, number = 0, 0
    for leg_index, leg in enumerate(legs):
        for index, iteration in enumerate(leg.collect):
            number += 1
            yield load_state(run.vertex_file(leg_index, index)), Origin(cycle=number, epoch=(spent + iteration) / steps)
        spent += leg.iterations


def _given(network: nn.Module, file: Path) -> dict:
    checkpoint.load_into(network, file)
    return {f"network.{name}": tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None


if __name__ == "__main__":
    door.main(Config, run, __doc__)
