"""Networks, data sets and losses passed as objects. Each is registered under a name, for use in the options of a run.

A run is resumed only if its options, the network's code and the data are unchanged. The name of a data set therefore
contains a fingerprint. The run itself compares the network: its parameters, seeded initial weights and outputs.
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
    """Return the name of a network, registering it if it is an object.

    Args:
        network: a name, which is returned unchanged; a factory `make(num_classes, input_shape)`; or a module, whose
            weights are re-initialised for each network.

    Raises:
        TypeError: `network` is none of these. For a module with parameters that no `reset_parameters` initialises, the
            error is raised when the network is built.
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
    """Return the name of a data set, registering it if it is an object.

    `data` is a name, which is returned unchanged; a function without arguments; or (train, validation, test).
    """
    if isinstance(data, str):
        return data
    if inspect.isroutine(data):
        return _registered(f"{data.__module__}.{data.__qualname__}", data)
    return _registered(f"{kind}-{_fingerprint(data)}", lambda: data)


def loss_name(loss: str | Callable[..., Any] | None) -> str | None:
    """Return the name of a loss, registering a function. Changes to its code are not detected when a run is resumed."""
    if loss is None or isinstance(loss, str):
        return loss
    logging.getLogger("modepath").info(
        f"note: changes to the loss {loss.__qualname__} are not detected when this run is resumed; "
        "after a change, use fresh=True"
    )
    return _registered(f"{loss.__module__}.{loss.__qualname__}", loss)


def weights_file(weights: Any) -> Path:
    """Return the file of initial weights: a path unchanged; a state dict or module is saved with the runs, by hash."""
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
                f"{left[0]!r} cannot be re-initialised, because its module has no reset_parameters. Each network needs "
                "its own initial weights. Give a function make(num_classes, input_shape) that builds the network; "
                "to start from existing weights, use init=…"
            )
        return made

    return make


def _fingerprint(data: Any) -> str:
    """Hash the content of arrays, and the type and length of other data sets (the run itself compares their data)."""
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
