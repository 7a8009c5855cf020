"""Batch-norm statistics at a given set of weights.

Statistics gathered while the weights moved do not belong to where they stopped. Re-estimating them on clean training
images took a network from 10.9 to 9.7 % test error in one probe, so it is done for every member and every baseline.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace the running statistics by their averages over the batches of normalised images (batch, C, H, W).

    Only batch norm is put in training mode: dropout would shift what it sees. Networks without it are left alone.
    """
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    training = network.training
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over batches
        layer.train()
    for images in batches:
        network(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.train(training)
