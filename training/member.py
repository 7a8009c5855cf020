"""The one place where weights become a member: batch norm, ONNX, parity, validation logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models_store.runtime import in_batches
from training import batch_norm
from training.data import Data, as_arrays
from training.export import Exporter, Normalised
from training.runs import State

PARITY_IMAGES = 256


@dataclass(frozen=True)
class Member:
    """A network at one point of weight space, ready to be published."""

    onnx: bytes
    state: State  # parameters and re-estimated buffers by torch name
    validation_logits: NDArray[np.float32]  # (batch, classes), from the ONNX member


def make(
    network: nn.Module, weights: State, data: Data, bn_images: int, device: torch.device, exporter: Exporter
) -> Member:
    """Turn a path point's weights into a member. Nothing else may: forgetting batch norm is this field's easiest mistake.

    Args:
        network: a module of the right architecture; its weights are overwritten.
        weights: parameters and buffers by torch name.
        data: batch norm is re-estimated on `train`, parity checked and logits taken on `validation`.
        bn_images: how many clean training images.
        device: where torch runs.
        exporter: one for all members of this network.

    Raises:
        ExportError: export failed, or the member answers differently from torch.
    """
    network.load_state_dict(weights)
    served = Normalised(network, data.mean, data.std).to(device)
    batch_norm.reestimate(served.network, _clean_images(data, bn_images, device, served))
    images, _ = as_arrays(data.validation)
    model, session = exporter.export(served, images[:PARITY_IMAGES], device)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
    return Member(model, state, in_batches(session, images))


def _clean_images(data: Data, count: int, device: torch.device, served: Normalised) -> Iterator[torch.Tensor]:
    # Which images is fixed, so that two members differ by their weights alone.
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:count]
    # Batches of 128 in this layout take 0.3 of the time of batches of 500 in the usual one (2 CPU cores, preresnet8).
    for images, _ in data.train.batches(order, 128):
        normalised = (images.to(device) - served.pixel_mean) / served.pixel_std
        yield normalised.contiguous(memory_format=torch.channels_last)
