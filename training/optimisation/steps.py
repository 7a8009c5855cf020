"""One step of training: of a network, or of the free vertices of a path through weight space.

A method with another update rule defines its own class of Steps, and its legs name the function that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from training.config import Config
from training.data import Data
from training.geometry.coefficients import Coefficients, Coordinates
from training.geometry.vertices import State, Vertices, put_into
from training.members import batch_norm, member
from training.networks import layout
from training.optimisation import optimizers
from training.runs import load_weights


@dataclass(frozen=True)
class Step:
    """The inputs of a step."""

    iteration: int  # number within its leg, from 1
    rate: float  # learning rate
    generator: np.random.Generator  # draws the same in all processes
    images: int  # number of images in the train split


@dataclass(frozen=True)
class Training:
    """The inputs of a function that makes steps."""

    config: Config
    fabric: Fabric
    network: nn.Module
    data: Data


@dataclass(frozen=True)
class Span:
    """Trained instead of one network: free vertices, such that networks drawn between all vertices have a low loss."""

    vertices: tuple[Path | None, ...]  # files of the fixed vertices; None: a free vertex
    # Initial free vertices, from the fixed ones and the names of the trained parameters.
    begin: Callable[[Sequence[State], Collection[str]], Sequence[State]]
    draw: Callable[
        [np.random.Generator, Coordinates | None], Coefficients
    ]  # the points of one step, (points, vertices)
    shown: np.ndarray  # (vertices,): the point whose validation scores are printed
    # Gradient of a geometric term of the loss at each free vertex, (free, vertices). If it is set, `draw` also receives
    # the coordinates of the vertices.
    push: Callable[[Coordinates], Coefficients] | None = None


# Adds the gradient of the mean loss over the step's images to the network's parameters; returns that loss, detached.
Pull = Callable[[], torch.Tensor]


def pull_of(loss: Callable[[], torch.Tensor]) -> Pull:
    """A Pull from a function that computes the mean loss, on one device."""

    def pull() -> torch.Tensor:
        found = loss()
        found.backward()  # pyright: ignore[reportUnknownMemberType]
        return found.detach()

    return pull


class Steps(Protocol):
    """How a leg updates its weights."""

    # Whether a leg without a start continues from the end of the leg before it, if that has steps of the same class.
    continues: ClassVar[bool]
    # Whether the weights that `show` loads need new batch-norm statistics, because the network has those of other
    # weights.
    shows_other_weights: ClassVar[bool]

    def take(self, pull: Pull, step: Step) -> torch.Tensor:
        """Take one step; `pull` runs the network on the step's images. Returns the mean loss, detached."""
        ...

    def show(self) -> None:
        """Load the weights whose validation scores are logged after an epoch into the network."""
        ...

    def state(self) -> State:
        """Weights and momenta, from which training can resume."""
        ...

    def restore(self, state: State) -> None:
        """Load weights and momenta that `state` returned."""
        ...

    def collected(self) -> list[State]:
        """The current values of the trained weight sets, as full state dicts."""
        ...


MakeSteps = Callable[[Training], Steps]


class OneNetwork:
    """One network. With an average (--ema), weights are collected from it."""

    continues: ClassVar[bool] = True
    shows_other_weights: ClassVar[bool] = False

    def __init__(self, training: Training):
        self._fabric, self._network = training.fabric, training.network
        config = training.config
        self._named = {name: one for name, one in training.network.named_parameters() if one.requires_grad}
        self._optimizer = optimizers.make(config, training.fabric, [self._named], decays=True)
        self._largest, self._decay = config.clip_norm, config.ema
        self._average: State | None = None  # of the trained parameters, once a step was taken

    def take(self, pull: Pull, step: Step) -> torch.Tensor:
        """See Steps."""
        optimizers.set_rate(self._optimizer, step.rate)
        self._optimizer.zero_grad()
        found = pull()
        optimizers.clip(self._optimizer, self._largest)
        self._optimizer.step()
        if self._decay:
            self._follow()
        return found

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights (Polyak and Juditsky 1992, with exponential weights)."""
        if self._average is None:
            self._average = {name: one.detach().clone() for name, one in self._named.items()}
            return
        for name, one in self._named.items():
            self._average[name].lerp_(one, 1 - self._decay)

    def show(self) -> None:
        """See Steps. The scores that are logged are those of the weights that train, not of their average."""

    def state(self) -> State:
        """See Steps."""
        state = {f"network.{name}": tensor for name, tensor in self._network.state_dict().items()}
        average = {f"average.{name}": tensor for name, tensor in (self._average or {}).items()}
        return state | average | optimizers.kept(self._optimizer, "", self._named)

    def restore(self, state: State) -> None:
        """See Steps."""
        put_into(self._network, _below(state, "network."))
        optimizers.restore(self._optimizer, "", self._named, state)
        average = _below(state, "average.")
        self._average = (
            {n: torch.empty_like(one).copy_(average[n]) for n, one in self._named.items()} if average else None
        )

    def collected(self) -> list[State]:
        """See Steps."""
        average = self._average or {}
        name_of = {id(one): name for name, one in self._named.items()}
        every = self._network.named_parameters(remove_duplicate=False)  # shared tensors have several names
        averaged = {name: average[name_of[id(one)]] for name, one in every if average and id(one) in name_of}
        return [{**self._network.state_dict(), **averaged}]


@dataclass(frozen=True)
class Between:
    """Makes the steps of a leg that trains the free vertices of a span."""

    span: Span

    def __call__(self, training: Training) -> BetweenVertices:
        """Read the fixed vertices, find the buffers that are batch-norm statistics, and make the steps."""
        fixed = [load_weights(file) for file in self.span.vertices if file is not None]
        network = training.network
        images = next(member.clean_images(training.data, 2, training.fabric.device, layout.of(network)))
        return BetweenVertices(training, self.span, fixed, batch_norm.statistics(network, images))


class BetweenVertices:
    """Free vertices. The loss is the mean over points drawn between all vertices. L2 applies at these points."""

    continues: ClassVar[bool] = False
    shows_other_weights: ClassVar[bool] = True

    def __init__(self, training: Training, span: Span, fixed: Sequence[State], statistics: set[str]):
        """`fixed` are the fixed vertices in order; `statistics` are the names that Vertices expects."""
        config, fabric, network = training.config, training.fabric, training.network
        self._config, self._fabric, self._network, self._span = config, fabric, network, span
        trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        given, begun = iter(fixed), iter(span.begin(fixed, trained))
        states = [next(begun) if file is None else next(given) for file in span.vertices]
        free = [i for i, file in enumerate(span.vertices) if file is None]
        network.zero_grad()  # the first step must not include gradients of an earlier leg
        self._vertices = Vertices(network, states, free, statistics)
        # The L2 penalty applies at the points, so the optimizer must not add one at the vertices.
        self._decay = config.weight_decay if optimizers.decays_at_points(config) else 0.0
        named = [self._vertices.named_trained(index) for index in free]
        self._optimizer = optimizers.make(config, fabric, named, decays=False)

    def take(self, pull: Pull, step: Step) -> torch.Tensor:
        """See Steps."""
        optimizers.set_rate(self._optimizer, step.rate)
        self._optimizer.zero_grad()
        positions = self._vertices.coordinates() if self._span.push else None
        if positions is not None and self._fabric.world_size > 1:
            # All processes must draw the same points, but their devices may round differently.
            positions = self._fabric.broadcast(positions)
        points = self._span.draw(step.generator, positions)
        total = torch.zeros((), device=self._fabric.device)
        for point in points:
            self._vertices.load_point(point)
            found = pull()
            self._vertices.pull_back(point, self._decay, 1 / len(points))
            total += found
        if self._span.push and positions is not None:
            for index, row in zip(self._vertices.free, self._span.push(positions), strict=True):
                self._vertices.add_to_gradient(index, row)
        optimizers.clip(self._optimizer, self._config.clip_norm)
        self._optimizer.step()
        return total / len(points)

    def show(self) -> None:
        """See Steps."""
        self._vertices.load_point(self._span.shown)

    def state(self) -> State:
        """See Steps."""
        state = {f"network.{name}": tensor for name, tensor in self._network.state_dict().items()}
        for index in self._vertices.free:
            state |= {f"vertex.{index}.{name}": tensor for name, tensor in self._vertices.named_trained(index).items()}
            state |= optimizers.kept(self._optimizer, f"{index}.", self._vertices.named_trained(index))
        return state

    def restore(self, state: State) -> None:
        """See Steps."""
        put_into(self._network, _below(state, "network."))
        for index in self._vertices.free:
            kept = _below(state, f"vertex.{index}.")
            with torch.no_grad():
                for name, weight in self._vertices.named_trained(index).items():
                    weight.copy_(kept[name])
            optimizers.restore(self._optimizer, f"{index}.", self._vertices.named_trained(index), state)

    def collected(self) -> list[State]:
        """See Steps."""
        return [self._vertices.state(index) for index in self._vertices.free]


def _below(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
