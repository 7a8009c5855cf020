"""Weight sets by name, and their combinations. Any module works unmodified: nothing here depends on the kind of layer.

A combination is written into the network's own parameters, and the gradient that backward computes there is, up to a
coefficient, the gradient of each vertex: ∂L/∂w_v = c_v ∂L/∂w. So a training step on a path costs as much as a plain
step, and data parallelism, mixed precision, compilation and tied weights work as they do for a plain network.
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
_CHUNK = 1 << 22  # weights at a time in float64: copies of all would need too much memory
_batched: Any = torch  # its foreach functions, one launch for many tensors, have no usable types


def put_into(network: nn.Module, state: State, strict: bool = True) -> None:
    """`load_state_dict` for weights in a plain dictionary, which are taken to be of the network's own version.

    torch stores versions of modules in an attribute of the dictionary, and some modules (torchvision's mnasnet) refuse
    weights without them.
    """
    versioned: Any = OrderedDict(state)
    versioned._metadata = getattr(network.state_dict(), "_metadata", None)
    network.load_state_dict(versioned, strict=strict)


def combine(states: Sequence[State], coefficients: Sequence[float] | NDArray[np.float64]) -> State:
    """Σ_v c_v w_v, by name. At a vertex, the result is exactly that vertex.

    Tensors that are equal in all vertices are copied. Tensors that are not floating-point cannot be averaged; they are
    those of the vertex with the largest coefficient.
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
    """Coordinates of the weight sets in an orthonormal basis of their span, over the named parameters.

    Returns (vertices, vertices), float64. Lengths, angles and volumes between the vertices follow from these to nearly
    all digits; from inner products they would follow to half of the digits only.
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
        """Copy the vertices to the network's device; `network` gets the buffers of the first one.

        Args:
            network: the network that points are loaded into.
            states: full state dicts of the network; those of free vertices are their initial weights.
            free: indices of the vertices that are trained.
            statistics: names of buffers that training mode updates; they are not loaded.
        """
        put_into(network, states[0])
        self.free = tuple(free)
        self._parameters = {k: p for k, p in network.named_parameters() if p.is_floating_point()}  # tied weights once
        first_name = {id(parameter): name for name, parameter in self._parameters.items()}
        kept = network.state_dict(keep_vars=True)
        self._name_of = {name: first_name[id(tensor)] for name, tensor in kept.items() if id(tensor) in first_name}
        self._buffers = [{k: v for k, v in state.items() if k not in self._name_of} for state in states]
        # With the parameter's device and memory layout.
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
        """The tensors to be optimised."""
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
        """Add `share` times the gradient at the loaded point to those of the free vertices, and clear the network's.

        The L2 penalty applies to the point, not to the vertices: its gradient is weight_decay · w(c).
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
            # Decided for each weight: a module that skips layers at random uses different ones at different points.
            again = [(weight.grad, gradient) for weight, gradient in pairs if weight.grad is not None]
            first = [(weight, gradient) for weight, gradient in pairs if weight.grad is None]
            if again:
                _batched._foreach_add_([total for total, _ in again], [gradient for _, gradient in again], alpha=scale)
            if first:
                # The last vertex gets the tensors themselves, which saves one copy of the gradient.
                own = [gradient if index == self.free[-1] else gradient.clone() for _, gradient in first]
                _batched._foreach_mul_(own, scale)
                for (weight, _), gradient in zip(first, own, strict=True):
                    weight.grad = gradient

    @torch.no_grad()
    def coordinates(self) -> Coordinates:
        """Relative coordinates of the vertices, (vertices, vertices), float64; all NaN if a vertex is not finite.

        They are computed on the device from inner products of the differences from the first vertex. Half of the digits
        of the differences are enough for a step. On the last axis every vertex has the norm of the first one, so that
        lengths can be compared with that of the weights. Products of fixed vertices are computed once.
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
            # A sum of differences loses fewer digits: the vertices have large norms and are nearly equal.
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
