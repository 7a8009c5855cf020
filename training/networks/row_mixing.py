"""Finds the layer of a network that makes the output for one image depend on the other images of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_TOLERANCE = 1e-3  # relative to the largest number in a tensor; far above rounding errors


@dataclass(frozen=True)
class _Seen:
    """A tensor that entered or left a layer."""

    name: str
    leaves: bool
    tensor: torch.Tensor


@torch.no_grad()
def first_mixing(network: nn.Module, images: torch.Tensor) -> str | None:
    """Name the first layer whose output for an image alone differs from that in the batch.

    Args:
        network: in eval mode.
        images: (batch, C, H, W), at least two, as the network takes them.

    Returns:
        A sentence for an error message; None if no layer could be identified.
    """
    try:
        together = _watch(network, images)
        for row in range(len(images)):
            alone = _watch(network, images[row : row + 1])
            if found := _first_difference(network, together, alone, row, len(images)):
                return found
    except Exception:  # some networks do not run on one image; that is reported elsewhere
        return None
    return None


def _watch(network: nn.Module, images: torch.Tensor) -> list[_Seen]:
    seen: list[_Seen] = []

    def entered(name: str):
        def hook(module: nn.Module, inputs: tuple[object, ...]) -> None:
            seen.extend(_Seen(name, False, one.clone()) for one in inputs[:1] if isinstance(one, torch.Tensor))

        return hook

    def left(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor):
                seen.append(_Seen(name, True, first.clone()))

        return hook

    handles = []
    for name, module in network.named_modules():
        handles += [module.register_forward_pre_hook(entered(name)), module.register_forward_hook(left(name))]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first_difference(
    network: nn.Module, together: list[_Seen], alone: list[_Seen], row: int, count: int
) -> str | None:
    before = ""
    for many, one in zip(together, alone, strict=False):
        if (many.name, many.leaves) != (one.name, one.leaves):
            return None  # its forward runs other layers for one image
        if _differs(many.tensor, one.tensor, row, count):
            return _sentence(network, many, before)
        if many.leaves:
            before = many.name
    return None


def _differs(many: torch.Tensor, one: torch.Tensor, row: int, count: int) -> bool:
    if many.ndim != one.ndim:
        return False
    axes = [axis for axis in range(many.ndim) if many.shape[axis] != one.shape[axis]]
    if len(axes) != 1 or many.shape[axes[0]] != count * one.shape[axes[0]]:
        return False
    width = one.shape[axes[0]]
    own, one = many.narrow(axes[0], row * width, width).float(), one.float()
    if not torch.isfinite(one).all():
        return False
    return bool((own - one).abs().nan_to_num(nan=float("inf")).max() > _TOLERANCE * one.abs().max())


def _sentence(network: nn.Module, seen: _Seen, before: str) -> str:
    layer = network.get_submodule(seen.name)
    parent = network.get_submodule(seen.name.rpartition(".")[0])
    if seen.leaves and list(layer.children()) and _is_own(layer):
        # Its children agree, so its own forward mixes images.
        return (
            f"The first to mix images is the forward of {_named(seen.name, layer)}, after its layers: compute over the axes of one image, not "
            "over axis 0."
        )
    if not seen.leaves:
        after = f", after {_short(before)!r}" if before else ""
        return (
            f"The first to mix images is the forward of {_named(seen.name.rpartition('.')[0], parent)}, before its layer "
            f"{_short(seen.name)!r}{after}: compute over the axes of one image, not over axis 0."
        )
    advice = "let it compute over the axes of one image, not over axis 0"
    if isinstance(layer, _NormBase) and not layer.track_running_stats:
        advice = "it normalises by the batch also in eval mode; make it with track_running_stats=True"
    elif getattr(layer, "batch_first", None) is False:
        advice = "it takes the batch for the sequence; make it with batch_first=True"
    return f"The first to mix images is its layer {_named(seen.name, layer)}: {advice}."


def _is_own(layer: nn.Module) -> bool:
    return not type(layer).__module__.startswith("torch.nn.")


def _short(name: str) -> str:
    return name.removeprefix("network.")


def _named(name: str, layer: nn.Module) -> str:
    short = _short(name)
    return f"{type(layer).__name__}" if short in ("", "network") else f"{short!r} ({type(layer).__name__})"
