"""Networks, data sets and losses given as objects: each gets a name, by which the options of a training can say it.

A training is resumed where its options, the network's code and the data agree. A name therefore holds a fingerprint where the object
has one; the code of a network is compared by the run itself (its parameters, seeded initial weights and answers).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn


def network_name(network: Any) -> str:
    """The name of a network: a string as it is, a factory `make(num_classes, input_shape)`, or a module, whose weights are initialised again.

    Raises:
        TypeError: something else, or a module with parameters that nothing initialises.
    """
    from torch import nn

    if isinstance(network, str):
        return network
    if isinstance(network, nn.Module):
        return _registered(type(network).__qualname__, _initialised_anew(network))
    if callable(network):
        return _registered(f"{network.__module__}.{network.__qualname__}", network)
    raise TypeError(
        f"network is a {type(network).__name__}; give a name, a function (num_classes, input_shape), or a module."
    )


def data_name(data: Any, kind: str = "data") -> str:
    """The name of a data set: a string as it is, a function without arguments, or (train, validation, test) as the contract has them."""
    if isinstance(data, str):
        return data
    if inspect.isroutine(data):
        return _registered(f"{data.__module__}.{data.__qualname__}", data)
    return _registered(f"{kind}-{_fingerprint(data)}", lambda: data)


def loss_name(loss: str | Callable[..., Any] | None) -> str | None:
    """The name of a loss; what a function does is not compared when a run is resumed."""
    if loss is None or isinstance(loss, str):
        return loss
    logging.getLogger("modepath").info(
        f"note: changes of the loss {loss.__qualname__} are not noticed when this run is resumed; use fresh=True after one"
    )
    return _registered(f"{loss.__module__}.{loss.__qualname__}", loss)


def weights_file(weights: Any) -> Path:
    """The file of given weights: a path as it is, or a state dict, which is kept with the runs under its own hash."""
    if isinstance(weights, str | Path):
        return Path(weights)
    from safetensors.torch import save

    state = weights.state_dict() if hasattr(weights, "state_dict") else weights
    content = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()})
    file = (
        Path(os.environ.get("MODEPATH_RUNS") or "runs")
        / "given"
        / f"{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    )
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return file


def _registered(name: str, found: Any) -> str:
    from training.data.import_string import OBJECT, register

    register(name, found)
    return OBJECT + name


def _initialised_anew(module: nn.Module) -> Callable[..., nn.Module]:
    def make(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        made = copy.deepcopy(module)
        reset: set[int] = set()
        for part in made.modules():
            if callable(initialise := getattr(part, "reset_parameters", None)):
                initialise()
                reset |= {id(parameter) for parameter in part.parameters(recurse=False)}
        if left := [name for name, parameter in made.named_parameters() if id(parameter) not in reset]:
            raise TypeError(
                f"the initial weights of {left[0]!r} cannot be drawn again, because its module has no reset_parameters. Each network needs its own. "
                "Give a function make(num_classes, input_shape) that builds the network; weights that you have come in with init=…"
            )
        return made

    return make


def _fingerprint(data: Any) -> str:
    """Of arrays their content, of other data sets their classes and lengths; what is read later is compared by the run."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if hasattr(part, "detach"):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        elif isinstance(part, Mapping):
            for key in part:
                digest.update(str(key).encode())
                add(part[key])
        elif isinstance(part, Sequence) and not isinstance(part, str | bytes) and len(part) < 10:
            for one in part:
                add(one)
        else:
            length = len(part) if hasattr(part, "__len__") else ""
            digest.update(
                f"{type(part).__qualname__} {length} {part if isinstance(part, str | int | float) else ''}".encode()
            )

    add(data)
    return digest.hexdigest()[:8]
