"""Batch-norm statistics at a given set of weights.

Statistics that were gathered while the weights changed do not fit the final weights. In one experiment, re-estimating
them on clean training images reduced the test error from 10.9 to 9.7 %, so it is done for every member and every
baseline.

For batch norm and instance norm the average is exact. Any other layer whose buffers change in training mode (the user's
own norm, spectral norm) is detected by running it, and updates its buffers by its own rule on the same images.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from training.networks import partial


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace the running statistics by their averages over the batches of normalised images (batch, C, H, W).

    Only layers with statistics are put in training mode, because dropout would shift their inputs. Networks without
    statistics are not changed.
    """
    if not _float_buffers(network):
        return
    modes = {module: module.training for module in network.modules()}
    # A frozen part keeps the statistics that it was given with.
    averaged = [
        m for m in network.modules() if isinstance(m, _NormBase) and m.track_running_stats and not partial.is_frozen(m)
    ]
    momenta = [layer.momentum for layer in averaged]
    seen = 0
    for images in batches:
        if seen == 0:
            found = statistics(network, images)
            if not found:
                break
            network.eval()
            for name in found:
                network.get_submodule(name.rpartition(".")[0]).training = True  # this module only, not its children
            for layer in averaged:
                layer.reset_running_stats()
                layer.train()
        seen += len(images)
        for layer in averaged:
            layer.momentum = len(images) / seen  # an average over images; InstanceNorm does not support None
        network(images)
    for layer, momentum in zip(averaged, momenta, strict=True):
        layer.momentum = momentum
    for module, mode in modes.items():
        module.training = mode


@torch.no_grad()
def statistics(network: nn.Module, images: torch.Tensor) -> set[str]:
    """Names of floating-point buffers that change when the network runs in training mode on images (batch, C, H, W)."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    modes = {module: module.training for module in network.modules()}
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # dropout draws; the caller's random state must not change
        partial.training_mode(network)
        network(images)
    moved: set[str] = set()
    for name, buffer in network.named_buffers():
        if not torch.equal(buffer, before[name]):
            buffer.copy_(before[name])
            if buffer.is_floating_point():
                moved.add(name)
    for module, mode in modes.items():
        module.training = mode
    return moved


def _float_buffers(network: nn.Module) -> list[str]:
    return [name for name, buffer in network.named_buffers() if buffer.is_floating_point()]
