"""The training loop. A method is a list of legs: each trains for some iterations, and collects weights after some.

An epoch's randomness is a function of (seed, leg, epoch) alone. So a run that resumes from the last finished epoch
computes the same as an uninterrupted run, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from training import logger
from training.config import Config
from training.data import Data, balance, in_order
from training.data.import_string import import_string
from training.errors import ConfigError, DeviceMemoryError, DivergenceError
from training.members import member
from training.networks import layout, partial
from training.networks.normaliser import Normaliser
from training.optimisation.adversary import Adversary
from training.optimisation.seeds import Stream, derive
from training.optimisation.steps import MakeSteps, OneNetwork, Step, Steps, Training
from training.runs import PREFIXED, Progress, Run, load_start, save_state
from training.runs.epoch_log import Log, epoch_log

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SHOWN_BN_IMAGES = 2048  # for the validation scores in the log of a path; members use --bn-images


@dataclass(frozen=True)
class Leg:
    """A stretch of SGD."""

    label: str
    iterations: int
    rate: Callable[[int], float]  # of the iteration i = 1 … iterations
    start: Path | None = None  # weights, and momenta if the file has them; None: see Steps.continues
    collect: tuple[int, ...] = ()  # iterations after which the weights are kept as a vertex
    keep: tuple[tuple[int, Path], ...] = ()  # (epoch, file): checkpoints that later legs start from
    steps: MakeSteps = OneNetwork  # makes the steps
    weight_sets: int = 1  # number of weight sets in a collection: as many as the steps train
    rate_option: str = "--lr"  # the option that sets the rate, for error messages
    passes: int = 1  # cost of an iteration in forward and backward passes


def iterations_per_epoch(data: Data, batch_size: int) -> int:
    """Number of whole batches in an epoch. A batch of few images would disturb batch norm."""
    return max(1, len(data.train) // batch_size)


def initialise(seed: int, number: int = 0) -> None:
    """Seed the random generators for the initial weights of the `number`-th network of a run."""
    _seed_everything(derive(seed, Stream.WEIGHTS, 0, number))


def train(
    config: Config,
    fabric: Fabric,
    run: Run,
    network: nn.Module,
    data: Data,
    legs: Sequence[Leg],
    only: Sequence[int] | None = None,
) -> float:
    """Train legs, resuming after the last finished epoch. Vertices are written to `run.vertex_file(leg, number)`.

    Args:
        config: the options.
        fabric: the device and the processes.
        run: the run, which holds what was trained before.
        network: its weights are overwritten.
        data: on the device.
        legs: of the plan.
        only: indices of the legs to train, ascending; None: all.

    Returns:
        Seconds spent in training, over all sessions of the run.

    Raises:
        DivergenceError: the loss is NaN or infinite.
        DeviceMemoryError: a batch does not fit into the memory of the GPU.
    """
    if config.channels_last:
        layout.convert(network, torch.channels_last)
    compiled: nn.Module = torch.compile(network) if config.compile else network  # pyright: ignore[reportAssignmentType]
    wrapped = fabric.setup_module(compiled)
    done = run.progress()
    log = epoch_log(config.log if fabric.is_global_zero else "none", run.folder, run.identity, config.deciding())
    job = _Job(config, fabric, run, network, wrapped, data, loss_of(config, data), log)
    steps: Steps | None = None
    seconds = done.seconds
    for index in range(len(legs)) if only is None else only:
        if index < done.leg:
            continue
        leg, first = legs[index], done.epoch if index == done.leg else 0
        before, steps = steps, leg.steps(Training(config, fabric, network, data))
        if index == done.leg and done != Progress():
            steps.restore(run.load_checkpoint())
            logger.info(f"resuming {leg.label} after epoch {done.epoch}")
        elif leg.start is not None:
            steps.restore(load_start(leg.start))
        elif before is not None and steps.continues and type(before) is type(steps):
            steps.restore(before.state())
        del before  # frees its optimizer
        seconds = job.run_leg(index, leg, steps, first, seconds)
    return seconds


@dataclass(frozen=True)
class _Job:
    config: Config
    fabric: Fabric
    run: Run
    network: nn.Module
    wrapped: nn.Module
    data: Data
    loss: Loss
    log: Log

    def run_leg(self, index: int, leg: Leg, steps: Steps, first: int, seconds: float) -> float:
        an_epoch = iterations_per_epoch(self.data, self.config.batch_size)
        epochs = math.ceil(leg.iterations / an_epoch)
        for epoch in range(first, epochs):
            began = time.monotonic()
            loss = self._epoch(index, leg, steps, epoch, an_epoch)
            steps.show()
            if steps.shows_other_weights:
                member.settle(self.network, self.data, SHOWN_BN_IMAGES, self.fabric.device)
            accuracy, nll = self._validate()
            seconds += time.monotonic() - began
            rate = leg.rate(min((epoch + 1) * an_epoch, leg.iterations))
            logger.info(
                f"{leg.label} epoch {epoch + 1}/{epochs}  rate {rate:.2e}  train loss {loss:.4f}  "
                f"validation accuracy {accuracy:.4f} nll {nll:.4f}  {time.monotonic() - began:.1f} s"
            )
            if self.fabric.is_global_zero:
                row = {
                    "leg": index,
                    "rate": rate,
                    "train_loss": loss,
                    "validation_accuracy": accuracy,
                    "validation_nll": nll,
                }
                self.log({**row, "seconds": seconds}, index * 10_000 + epoch + 1)
                self._save(index, leg, steps, epoch + 1, seconds)
            self.fabric.barrier()  # the next leg may start from what was just saved
        return seconds

    def _epoch(self, index: int, leg: Leg, steps: Steps, epoch: int, an_epoch: int) -> float:
        device, size = self.fabric.device, self.config.batch_size
        seed = derive(self.config.seed, Stream.ORDER, index, epoch)
        order = order_of(self.config, self.data, torch.Generator().manual_seed(seed))[: an_epoch * size]
        rank, world = self.fabric.global_rank, self.fabric.world_size
        if world > 1:  # each process takes its share of every batch
            order = order.view(an_epoch, -1)[:, rank::world].reshape(-1)
            size = order.numel() // an_epoch
        generator = torch.Generator().manual_seed(
            derive(self.config.seed, Stream.AUGMENTATION, index, epoch, rank=rank)
        )
        _seed_everything(derive(self.config.seed, Stream.DROPOUT, index, epoch, rank=rank))
        # Points between vertices are the same in all processes, because their gradients are averaged.
        between = np.random.default_rng(derive(self.config.seed, Stream.WEIGHTS, 1 + index, epoch))
        normalise = Normaliser.of(self.data).to(device)
        adversary = self._adversary(normalise)
        memory_format = layout.of(self.network)
        total, count, i = torch.zeros((), device=device), 0, 0
        first_bad = torch.full((), math.inf, device=device)  # number of the first step whose loss is not finite
        self.wrapped.train()
        partial.training_mode(self.network)
        batches = self.data.train.batches(order, size)
        bar = tqdm(batches, f"{leg.label} {epoch + 1}", an_epoch, leave=False, disable=None if rank == 0 else True)
        for step, (images, labels) in enumerate(bar, 1):
            i = epoch * an_epoch + step
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            images, labels = self.data.mix(self.data.augment(images, generator), labels, generator)
            images = layout.arrange(normalise(images), memory_format)

            def pull(images: torch.Tensor = images, labels: torch.Tensor = labels) -> torch.Tensor:
                if adversary is not None:
                    images = adversary.attack(self.network, self.loss, images, labels, self.fabric.autocast)
                return self._pull(images, labels)

            loss: torch.Tensor | None = None
            with contextlib.suppress(torch.OutOfMemoryError):
                loss = steps.take(pull, Step(i, leg.rate(i), between, len(self.data.train)))
            if loss is None:  # here the exception is gone, which kept what the failed step had computed
                raise self._does_not_fit(images, labels)
            total += loss
            first_bad = torch.where(loss.isfinite(), first_bad, first_bad.clamp(max=step))
            count += 1
            if i in leg.collect and self.fabric.is_global_zero:
                states = steps.collected()
                assert len(states) == leg.weight_sets, (
                    "Leg.weight_sets must be the number of weight sets that its steps train"
                )
                for number, state in enumerate(states, leg.collect.index(i) * leg.weight_sets):
                    save_state(self.run.vertex_file(index, number), state)
            if i == leg.iterations:
                break
        mean = total / count
        if world > 1:  # of all processes, so that all of them know of a loss that is not finite
            mean = cast("torch.Tensor", self.fabric.all_reduce(mean, reduce_op="mean"))
        mean_loss = float(mean)
        # Checked once in an epoch, because reading it in every step would make a GPU wait.
        if not math.isfinite(mean_loss):
            at = int(min(float(first_bad), count))  # the sum of finite losses may overflow
            raise DivergenceError(
                f"The loss became {mean_loss} in epoch {epoch + 1} of {leg.label}, in step {at} of {an_epoch}, at a learning rate "
                f"of {leg.rate(epoch * an_epoch + at):.3g}. The rate is likely too high, or the data or loss contain NaN; try {leg.rate_option} at a third of its value. Nothing was published."
            )
        return mean_loss

    def _pull(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Add the gradient of the mean loss over a batch, in one part or several (--accumulate)."""
        total = torch.zeros((), device=self.fabric.device)
        size = math.ceil(len(images) / self.config.accumulate)
        for part, known in zip(images.split(size), labels.split(size), strict=True):
            loss = self.loss(self.wrapped(part), known)
            share = len(part) / len(images)
            self.fabric.backward(loss if share == 1 else loss * share)
            total = loss.detach() if share == 1 else total + loss.detach() * share
        return total

    def _does_not_fit(self, images: torch.Tensor, labels: torch.Tensor) -> DeviceMemoryError:
        """Find out by trying how many images of this batch fit into the memory of the device at once."""
        fits = at_once = math.ceil(len(images) / self.config.accumulate)
        if self.fabric.world_size > 1:  # the other processes wait for this one, so nothing can be tried
            return DeviceMemoryError(
                f"The memory of {self.fabric.device} does not hold {at_once} images at once. Give --accumulate {2 * self.config.accumulate}, or a smaller "
                "--batch-size."
            )
        while fits > 1:
            fits //= 2
            self.network.zero_grad(set_to_none=True)
            if self.fabric.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self.loss(self.network(images[:fits]), labels[:fits]).backward()
            except torch.OutOfMemoryError:
                continue
            finally:
                self.network.zero_grad(set_to_none=True)
            parts = math.ceil(len(images) / fits)
            return DeviceMemoryError(
                f"The memory of {self.fabric.device} does not hold {at_once} images at once; {fits} were tried and "
                f"fit. --accumulate {parts} computes the same batches in parts; --batch-size {fits} makes smaller ones."
            )
        return DeviceMemoryError(
            f"The memory of {self.fabric.device} does not hold one image of this network. Use a smaller one, or --device cpu."
        )

    def _adversary(self, normalise: Normaliser) -> Adversary | None:
        config, mean, std = self.config, normalise.pixel_mean, normalise.pixel_std
        if not config.adversarial_epsilon:
            return None
        if self.data.input.kind != "image" or mean is None or std is None:
            raise ConfigError(f"--adversarial-epsilon is for images; this data set has {self.data.input.kind}.")
        return Adversary(config.adversarial_epsilon, config.adversarial_steps, config.adversarial_share, mean, std)

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        device = self.fabric.device
        normalise = Normaliser.of(self.data).to(device)
        right, nll = torch.zeros((), device=device), torch.zeros((), device=device)
        self.wrapped.eval()
        for images, labels in self.data.validation.batches(in_order(self.data.validation), 512):
            labels = labels.to(device)
            images = layout.arrange(normalise(images.to(device)), torch.contiguous_format)
            logits = self.wrapped(images).float()
            right += (logits.argmax(1) == labels).sum()
            nll += functional.cross_entropy(logits, labels, reduction="sum")
        count = len(self.data.validation)
        return float(right) / count, float(nll) / count

    def _save(self, index: int, leg: Leg, steps: Steps, epoch: int, seconds: float) -> None:
        state = steps.state()
        for kept, file in leg.keep:
            if kept == epoch:
                save_state(file, state, PREFIXED)
        self.run.save_checkpoint(state, Progress(index, epoch, seconds))


def order_of(config: Config, data: Data, generator: torch.Generator) -> torch.Tensor:
    """The rows of an epoch in their order, as many as the train split has.

    Raises:
        ConfigError: --draw weights, but the data set gives none.
        DataError: --draw balanced, but the labels are unknown.
    """
    rows = len(data.train)
    if config.draw == "uniform":
        return torch.randperm(rows, generator=generator)
    if config.draw == "balanced":
        weights = balance.row_weights(data.train.labels, len(data.classes))
    elif (weights := data.weights) is None:
        raise ConfigError(f"--draw weights: {config.dataset!r} gives no `weights`, one number for each training row.")
    return balance.drawn(weights, rows, generator)


def loss_of(config: Config, data: Data) -> Loss:
    """Returns the loss function of logits (batch, classes) and labels (batch,), or of shares of the classes (batch, classes).

    Raises:
        ConfigError: --loss names something that cannot be called, or --class-weights are wrong.
        DataError: --class-weights need labels that are unknown.
        ImportStringError: --loss cannot be imported.
    """
    if config.loss is None:
        weights = balance.class_weights(config.class_weights, data.train.labels, data.classes)
        if weights is None:
            return lambda logits, labels: functional.cross_entropy(
                logits, labels, label_smoothing=config.label_smoothing
            )

        def weighted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            # Not torch's mean, which divides by the weights of the batch: the parts of a batch would weigh differently.
            total = functional.cross_entropy(
                logits, labels, weights.to(logits.device), reduction="sum", label_smoothing=config.label_smoothing
            )
            return total / len(logits)

        return weighted
    loss: Any = import_string(config.loss)
    if not callable(loss):
        raise ConfigError(f"--loss {config.loss} must be a function of (logits, labels).")
    return cast("Loss", loss)


def _seed_everything(seed: int) -> None:
    # Dropout draws from torch; a user's loss or data set may draw from any of these.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
