"""The optimizer of a step: SGD, AdamW, or the user's own; what it keeps between steps; clipping and layer-wise rates."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from lightning_fabric import Fabric

from training.config import Config
from training.data.import_string import import_string
from training.errors import ConfigError
from training.geometry.vertices import State

Named = Mapping[str, torch.Tensor]  # the trained tensors by torch name
_MOMENTUM = "momentum_buffer"  # of SGD; its names in checkpoints are those of the first releases


def make(config: Config, fabric: Fabric, groups: Iterable[Named], *, decays: bool) -> torch.optim.Optimizer:
    """Make the optimizer of one network, or of the free vertices of a path.

    Args:
        config: the options.
        fabric: the device.
        groups: the trained tensors, of each weight set.
        decays: whether the optimizer applies the weight decay. Otherwise the caller does, as a penalty at points of a
            path; the decoupled decay of AdamW is linear in the weights and stays with the optimizer.

    Raises:
        ConfigError: the user's factory does not return an optimizer.
    """
    parameters: list[dict[str, Any]] = []
    for named in groups:
        scales = _scales(named, config.layer_decay)
        for scale in sorted(set(scales.values())):
            parameters.append({"params": [t for name, t in named.items() if scales[name] == scale], "scale": scale})
    fused = fabric.device.type == "cuda" or None
    if config.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
            weight_decay=config.weight_decay if decays else 0.0, fused=fused,
        )  # fmt: skip
    elif config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    else:
        try:
            optimizer = import_string(config.optimizer)(
                parameters, lr=config.lr, weight_decay=config.weight_decay if decays else 0.0
            )
        except TypeError as error:
            raise ConfigError(
                f"--optimizer {config.optimizer} is called with (parameters, lr=…, weight_decay=…): {error}"
            ) from None
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"--optimizer {config.optimizer} returned {type(optimizer).__name__}, not a torch optimizer."
            )
    return fabric.setup_optimizers(optimizer)  # pyright: ignore[reportReturnType]


def decays_at_points(config: Config) -> bool:
    """Whether the weight decay is a penalty at the points of a path, and not a part of the optimizer's step."""
    return config.optimizer != "adamw"


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step; layers may have a share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def clip(optimizer: torch.optim.Optimizer, largest: float | None) -> None:
    """Scale all gradients so that their norm is at most `largest`; None: leave them."""
    if largest is not None:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        torch.nn.utils.clip_grad_norm_(tensors, largest)


def kept(optimizer: torch.optim.Optimizer, prefix: str, named: Named) -> State:
    """What the optimizer keeps between steps, by name: for checkpoints."""
    found: State = {}
    for name, tensor in named.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            if value is None:
                continue
            if key == _MOMENTUM:
                found[f"momentum.{prefix}{name}"] = value
            elif isinstance(value, torch.Tensor | int | float):
                found[f"optimizer.{key}.{prefix}{name}"] = torch.as_tensor(value)
            else:
                raise ConfigError(
                    f"The optimizer keeps {key!r} as {type(value).__name__}, which cannot be stored in a checkpoint. Use tensors and numbers."
                )
    return found


def restore(optimizer: torch.optim.Optimizer, prefix: str, named: Named, state: State) -> None:
    """Give the optimizer what `kept` returned; tensors get the parameter's device and memory layout."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    keys = {match[1] for name in state if (match := re.match(r"optimizer\.([^.]+)\.", name))}
    for name, tensor in named.items():
        own: dict[str, Any] = {}
        for key in keys:
            if (value := state.get(f"optimizer.{key}.{prefix}{name}")) is not None:
                same = value.shape == tensor.shape
                if same:
                    own[key] = torch.empty_like(tensor, requires_grad=False).copy_(value)
                else:  # a counter, which fused steps read on the device
                    own[key] = value.to(tensor.device if on_device else value.device, copy=True)
        if (momentum := state.get(f"momentum.{prefix}{name}")) is not None:
            own[_MOMENTUM] = torch.empty_like(tensor, requires_grad=False).copy_(momentum)
        cast("dict[Any, Any]", optimizer.state).pop(tensor, None)
        if own:
            optimizer.state[tensor] = own


def _scales(named: Named, decay: float) -> dict[str, float]:
    """The share of the learning rate of each tensor: decay^(layers above it). The last layer has all of it."""
    # Names in a row that belong to one layer; a name such as encoder.norm may stand before and after the blocks.
    runs = [list(run) for _, run in itertools.groupby(named, _layer)]
    return {name: decay ** (len(runs) - 1 - number) for number, run in enumerate(runs) for name in run}


def _layer(name: str) -> str:
    """The layer of a tensor: its name up to the first number, such as blocks.3 or layer_3, or else its first part."""
    match = re.match(r"(.*?[._]\d+|\d+)\.", name)
    return match[1] if match else name.partition(".")[0]
