"""Weight sets by name, and their combinations. Any module works unmodified: nothing here knows a layer.

A combination is written into the network's own parameters, and the gradient that backward leaves there is the gradient
of each vertex but for its coefficient: ∂L/∂w_v = c_v ∂L/∂w. So a step through a path costs what a plain step costs, and
data parallelism, mixed precision, compilation and tied weights work as they do for a plain network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.geometry.coefficients import Coordinates

State = dict[str, torch.Tensor]  # parameters and buffers by torch name
_CHUNK = 1 << 22  # weights at a time in float64: copies of all would be many weight sets
_batched: Any = torch  # its foreach functions, one launch for many tensors, carry no usable types


def put_into(network: nn.Module, state: State, strict: bool = True) -> None:
    """`load_state_dict`, for weights that are a plain dictionary: of the network's own version.

    torch keeps versions of modules in an attribute of the dictionary, and some modules (torchvision's mnasnet) refuse weights without.
    """
    versioned: Any = OrderedDict(state)
    versioned._metadata = getattr(network.state_dict(), "_metadata", None)
    network.load_state_dict(versioned, strict=strict)


def combine(states: Sequence[State], coefficients: Sequence[float] | NDArray[np.float64]) -> State:
    """Σ_v c_v w_v, by name. At a vertex, exactly that vertex.

    What is equal in all of them stays as it is, and so do numbers that cannot be averaged (of the vertex with the
    largest coefficient).
    """
    nearest = states[int(np.argmax(coefficients))]
    combined: State = {}
    for name, tensor in nearest.items():
        others = [state[name] for state in states]
        if not tensor.is_floating_point() or all(torch.equal(tensor, other) for other in others):
            combined[name] = tensor.clone()
            continue
        total = others[0] * float(coefficients[0])
        for other, coefficient in zip(others[1:], coefficients[1:], strict=True):
            total.add_(other, alpha=float(coefficient))
        combined[name] = total
    return combined


def coordinates(states: Sequence[State], parameters: Sequence[str]) -> Coordinates:
    """Where the weight sets lie in an orthonormal basis of what they span, over the named parameters: (vertices, vertices), float64.

    Lengths, angles and volumes of everything between them follow, to nearly all digits: inner products would keep half of them.
    """
    factor: NDArray[Any] = np.zeros((len(states), len(states)))
    for name in parameters:
        flat = torch.stack([state[name].detach().cpu().flatten() for state in states], dim=1)
        for chunk in flat.split(_CHUNK):
            rows: Any = np.linalg.qr(np.concatenate([factor, chunk.double().numpy()]), mode="r")
            factor = rows
    return factor.T


class Vertices:
    """The vertices of a path on a network's device, some of them free to be trained."""

    def __init__(self, network: nn.Module, states: Sequence[State], free: Sequence[int], statistics: Collection[str]):
        """Lay out the vertices; `network` gets the first one's buffers.

        Args:
            network: that points are loaded into.
            states: full state dicts of it, the free ones where they start.
            free: which of them are trained.
            statistics: buffers that training mode keeps up to date by itself; they are not loaded.
        """
        put_into(network, states[0])
        self.free = tuple(free)
        self._parameters = {k: p for k, p in network.named_parameters() if p.is_floating_point()}  # a tied weight once
        first_name = {id(parameter): name for name, parameter in self._parameters.items()}
        kept = network.state_dict(keep_vars=True)
        self._name_of = {name: first_name[id(tensor)] for name, tensor in kept.items() if id(tensor) in first_name}
        self._buffers = [{k: v for k, v in state.items() if k not in self._name_of} for state in states]
        # Like the parameter in device and memory layout.
        self._weights = [
            [torch.empty_like(p).copy_(state[name]).detach() for name, p in self._parameters.items()]
            for state in states
        ]
        for index in self.free:
            for weight, parameter in zip(self._weights[index], self._parameters.values(), strict=True):
                weight.requires_grad_(parameter.requires_grad)
        differing = [
            name
            for name, tensor in self._buffers[0].items()
            if name not in statistics and any(not torch.equal(tensor, other[name]) for other in self._buffers)
        ]
        self._loaded_buffers = {name: kept[name] for name in differing}
        self._products: NDArray[np.float64] | None = None

    def trained(self) -> list[torch.Tensor]:
        """What an optimizer gets."""
        return [weight for index in self.free for weight in self._weights[index] if weight.requires_grad]

    @torch.no_grad()
    def load_point(self, coefficients: NDArray[np.float64]) -> None:
        """Write Σ_v c_v w_v into the network."""
        target = list(self._parameters.values())
        _batched._foreach_copy_(target, self._weights[0])
        _batched._foreach_mul_(target, float(coefficients[0]))
        for weights, coefficient in zip(self._weights[1:], coefficients[1:], strict=True):
            _batched._foreach_add_(target, weights, alpha=float(coefficient))
        if self._loaded_buffers:
            point = combine([{k: buffers[k] for k in self._loaded_buffers} for buffers in self._buffers], coefficients)
            for name, buffer in self._loaded_buffers.items():
                buffer.copy_(point[name])

    @torch.no_grad()
    def pull_back(self, coefficients: NDArray[np.float64], weight_decay: float, share: float = 1.0) -> None:
        """Add the gradient at the loaded point, times `share`, to those of the free vertices, and take it from the network.

        L2 belongs to the point, not to the vertices: its gradient is weight_decay · w(c).
        """
        used = [i for i, p in enumerate(self._parameters.values()) if p.grad is not None]
        parameters = [list(self._parameters.values())[i] for i in used]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if weight_decay:
            _batched._foreach_add_(gradients, parameters, alpha=weight_decay)
        for parameter in parameters:
            parameter.grad = None
        for index in self.free:
            scale = float(coefficients[index]) * share
            pairs = list(zip((self._weights[index][i] for i in used), gradients, strict=True))
            # Each weight by itself: a module that leaves out layers at random uses other ones at other points.
            again = [(weight.grad, gradient) for weight, gradient in pairs if weight.grad is not None]
            first = [(weight, gradient) for weight, gradient in pairs if weight.grad is None]
            if again:
                _batched._foreach_add_([total for total, _ in again], [gradient for _, gradient in again], alpha=scale)
            if first:
                # The last vertex keeps the tensors themselves: a gradient less in memory.
                own = [gradient if index == self.free[-1] else gradient.clone() for _, gradient in first]
                _batched._foreach_mul_(own, scale)
                for (weight, _), gradient in zip(first, own, strict=True):
                    weight.grad = gradient

    @torch.no_grad()
    def coordinates(self) -> Coordinates:
        """Where the vertices lie to each other, (vertices, vertices), float64; NaN where one of them is not finite.

        From inner products of their differences from the first one, which stay on the device: half of the digits of differences are enough
        for a step. Along the last axis all lie as far from 0 as the first one does, so that lengths can be compared with the weights'.
        Products of fixed vertices are computed once.
        """
        count = len(self._weights)
        pairs = [(i, j) for i in range(count) for j in range(i + 1) if j or not i]
        moved = set(range(count)) if 0 in self.free else set(self.free)
        due = [pair for pair in pairs if self._products is None or set(pair) & moved]
        wanted = sorted({index for pair in due for index in pair} | {0})
        totals = torch.zeros(len(due), dtype=torch.float64, device=self._weights[0][0].device)
        for tensors in zip(*self._weights, strict=True):
            parts = {index: tensors[index].flatten().split(_CHUNK) for index in wanted}
            for number in range(len(parts[0])):
                first = parts[0][number].double()
                part = {index: parts[index][number].double() - first if index else first for index in wanted}
                totals += torch.stack([part[i] @ part[j] for i, j in due])
        if self._products is None:
            self._products = np.zeros((count, count))
        for (i, j), value in zip(due, totals.tolist(), strict=True):
            self._products[i, j] = self._products[j, i] = value
        if not np.isfinite(self._products).all():
            return np.full((count, count), np.nan)
        values, axes = np.linalg.eigh(self._products[1:, 1:])
        positions = np.zeros((count, count))
        positions[1:, :-1] = axes * np.sqrt(np.maximum(values, 0))
        positions[:, -1] = np.sqrt(self._products[0, 0])
        return positions

    @torch.no_grad()
    def add_to_gradient(self, index: int, coefficients: NDArray[np.float64]) -> None:
        """Add Σ_v c_v w_v, whose coefficients sum to 0, to the gradient of free vertex `index`."""
        for position, weight in enumerate(self._weights[index]):
            if weight.grad is None:
                continue
            first = self._weights[0][position]
            # As a sum of differences: the vertices themselves are long and nearly alike.
            for other, coefficient in zip(self._weights[1:], coefficients[1:], strict=True):
                weight.grad.add_(other[position] - first, alpha=float(coefficient))

    def state(self, index: int) -> State:
        """Vertex `index` as a state dict."""
        weights = dict(zip(self._parameters, self._weights[index], strict=True))
        return {name: weights[first].detach() for name, first in self._name_of.items()} | self._buffers[index]

    def named_trained(self, index: int) -> dict[str, torch.Tensor]:
        """The trained tensors of free vertex `index` by parameter name."""
        named = zip(self._parameters, self._weights[index], strict=True)
        return {name: weight for name, weight in named if weight.requires_grad}
