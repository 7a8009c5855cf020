"""Turns weights into a member: batch norm, ONNX export, parity, validation logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models_store.graphs import independence
from models_store.graphs.runtime import in_batches
from models_store.inputs import kinds
from training.data import Data, as_arrays
from training.errors import ExportError
from training.geometry.vertices import State, put_into
from training.members import batch_norm
from training.members.export import Exporter, Normalised, open_exported
from training.members.quantising import Quantiser
from training.networks import layout
from training.networks.normaliser import Normaliser

PARITY_IMAGES = 256


@dataclass(frozen=True)
class Member:
    """A network at one point of weight space, ready to be published."""

    onnx: bytes
    state: State  # parameters and re-estimated buffers by torch name
    validation_logits: NDArray[np.float32]  # (batch, classes), from the ONNX member
    exact_logits: NDArray[np.float32]  # the same before quantisation


def make(
    network: nn.Module,
    weights: State,
    data: Data,
    bn_images: int,
    device: torch.device,
    exporter: Exporter,
    quantiser: Quantiser | None = None,
) -> Member:
    """Turn a path point's weights into a member. No other code may do so, because batch norm is easily forgotten.

    Args:
        network: a module of the right architecture; its weights are overwritten.
        weights: parameters and buffers by torch name.
        data: batch norm is re-estimated on `train`, parity checked and logits taken on `validation`.
        bn_images: number of clean training images for batch norm.
        device: where torch runs.
        exporter: the same for all members of this network.
        quantiser: the same for all members; None: they stay float32.

    Raises:
        ExportError: export failed, or the member's outputs differ from torch's or depend on the other images of a
        batch.
    """
    put_into(network, weights)
    served = Normalised.of(network, data).to(device)
    settle(network, data, bn_images, device)
    images, _ = as_arrays(data.validation)
    model, session = exporter.export(served, images[:PARITY_IMAGES], device)
    exact = logits = in_batches(session, images)
    if quantiser is not None:
        model = quantiser(model)
        session = open_exported(model)
        logits = in_batches(session, images)
    if (fault := independence.fault(session.logits, kinds.probes(data.input, images), exporter.spec)) is not None:
        raise ExportError(
            f"The exported member {fault}. Served, it would mix the images of several clients. Nothing was published."
        )
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
    return Member(model, state, logits, exact)


def settle(network: nn.Module, data: Data, bn_images: int, device: torch.device) -> None:
    """Re-estimate the batch-norm statistics for the network's weights on clean training images."""
    batch_norm.reestimate(network, clean_images(data, bn_images, device, layout.of(network)))


def clean_images(
    data: Data, count: int, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format
) -> Iterator[torch.Tensor]:
    """Normalised training images without augmentation, always the same ones, (batch, C, H, W)."""
    # The choice of images is fixed, so that two members differ in their weights only.
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:count]
    normalise = Normaliser.of(data).to(device)
    # Batches of 128 in channels-last take 0.3 of the time of batches of 500 in the contiguous layout (2 CPU cores,
    # preresnet8).
    for images, _ in data.train.batches(order, 128):
        yield layout.arrange(normalise(images.to(device)), memory_format)
