"""The memory layout that a network computes in.

Channels-last is faster on CPUs and GPUs alike, but not every network runs in it: `x.view(len(x), -1)` after a
convolution needs contiguous images. The layout is chosen once, before training. From then on it is the layout of the
network's weights, and images get the same.
"""

from __future__ import annotations

import torch
from torch import nn

SAFE_CHANNELS = 8


def convert(network: nn.Module, layout: torch.memory_format) -> None:
    """Convert the weights of convolutions to a layout, in place.

    A network with a convolution whose gradient torch computes wrongly in channels-last stays contiguous.
    """
    if layout == torch.channels_last and any(_corrupts(module) for module in network.modules()):
        return
    network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]


def _corrupts(module: nn.Module) -> bool:
    # In channels-last, the backward pass of a 1×1 convolution with a stride and few input channels writes out of
    # bounds on some CPUs (torch 2.14.1: `corrupted double-linked list`, or a crash later).
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels < SAFE_CHANNELS
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
    )


def arrange(images: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Images (batch, C, H, W) in a layout, even with one channel, for which torch confuses the two; other inputs contiguous."""
    if images.ndim != 4:
        return images.contiguous()
    if memory_format == torch.contiguous_format and images.stride() != _strides(images.shape):
        return images.clone(memory_format=memory_format)
    return images.contiguous(memory_format=memory_format)


def of(network: nn.Module) -> torch.memory_format:
    """The layout of a network's weights; contiguous if they do not show it."""
    for weight in network.parameters():
        decided = weight.ndim == 4 and not weight.is_contiguous()
        if decided and weight.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format


@torch.no_grad()
def prefer_channels_last(network: nn.Module, images: torch.Tensor) -> None:
    """Convert a network for inference to channels-last, if it runs in that layout on the images (batch, C, H, W)."""
    mode = network.training
    convert(network, torch.channels_last)
    try:
        network.eval()(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        convert(network, torch.contiguous_format)
    network.train(mode)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[axis + 1 :].numel() for axis in range(len(shape)))
