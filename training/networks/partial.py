"""Partial training: only some parameters move; the rest of the network is frozen, with its batch norm and dropout in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from training.errors import NetworkError

_MARK = "modepath_frozen"  # attribute of frozen modules; copies of a network keep it


def freeze(network: nn.Module, train: Sequence[str], frozen: Sequence[str]) -> None:
    """Let only some parameters be trained.

    Args:
        network: the network.
        train: patterns of the names that are trained, such as `fc.*`; empty: all.
        frozen: patterns of names that are not trained, even if `train` names them.

    Raises:
        NetworkError: a pattern fits no parameter, or nothing is left to train.
    """
    if not train and not frozen:
        return
    names = [name for name, _ in network.named_parameters()]
    for pattern in (*train, *frozen):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise NetworkError(
                f"No parameter's name fits {pattern!r}. The names are {', '.join(names[:5])}, …, {', '.join(names[-2:])}."
            )
    for name, parameter in network.named_parameters():
        chosen = not train or any(fnmatchcase(name, pattern) for pattern in train)
        parameter.requires_grad_(chosen and not any(fnmatchcase(name, pattern) for pattern in frozen))
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise NetworkError("--train and --freeze leave no parameter to train.")
    _mark(network)


def training_mode(network: nn.Module) -> None:
    """Put a network in training mode, but its frozen modules in eval mode."""
    network.train()
    for module in network.modules():
        if is_frozen(module):
            module.training = False


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` has frozen a module with all of its parameters."""
    return getattr(module, _MARK, False)


def _mark(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        for inner in module.modules():
            setattr(inner, _MARK, True)
        return
    for child in module.children():
        _mark(child)


def trained_share(network: nn.Module) -> float:
    """Share of the parameters that are trained, in (0, 1]."""
    sizes = torch.tensor([[p.numel(), p.numel() * p.requires_grad] for p in network.parameters()]).sum(dim=0)
    return float(sizes[1] / sizes[0])
