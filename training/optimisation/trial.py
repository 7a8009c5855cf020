"""Checks a network before it is trained, so that obstacles to its publication do not appear only after the last epoch.

In eval mode its logits for an image must depend on that image only, it must not change its input or its buffers, and it
must export to ONNX. In training mode one step must work. Each check runs on a copy, and does not change the random
state.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import onnx
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from models_store.graphs import independence, output_kind
from models_store.inputs import kinds
from training import logger
from training.config import Config
from training.data import Data
from training.errors import ConfigError, ExportError, NetworkError, TrainingError
from training.members import member
from training.members.export import LOGITS_TOLERANCE, Exporter, Normalised, torch_logits
from training.networks import layout, partial
from training.networks.normaliser import Normaliser
from training.networks.row_mixing import first_mixing
from training.optimisation import hardware, loop

C = TypeVar("C", bound=Config)
_CPU = torch.device("cpu")
_IMAGES = 8


def check(network: nn.Module, data: Data, exporter: Exporter) -> None:
    """Check a network, with its initial or given weights, against the requirements on members.

    Args:
        network: on the CPU; it is not changed.
        data: the source of a few real images.
        exporter: traces the network, so that it is ready to export members.

    Raises:
        NetworkError: the network has no parameters, changes its input or a buffer in eval mode, does not return logits,
        or its
            rows depend on each other.
        ExportError: torch cannot export it, or the exported graph gives other outputs.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise NetworkError("The network has no parameters that require a gradient: there is nothing to train.")
    with _randomness_untouched():
        tried = _copy(network)
        images, _ = next(data.train.batches(torch.arange(min(_IMAGES, len(data.train))), _IMAGES))
        real = images.cpu().numpy()
        served = Normalised.of(tried, data).eval()
        probes = kinds.probes(data.input, real)
        # Its batch-norm statistics are not computed yet; without them, a deep network may return infinity.
        try:
            member.settle(tried, data, _IMAGES, _CPU)
        except Exception as error:  # a network may raise anything
            raise NetworkError(
                f"The network fails in training mode on {_IMAGES} images: {_first_line(error)}. Correct its forward in training mode."
            ) from error
        served.eval()
        _refuse_writes(served, torch.from_numpy(probes))
        _refuse_mixed_rows(served, probes)
        answers = torch_logits(served, probes, _CPU)
        _refuse_probabilities(answers, None)
        model, session = exporter.trace(served)
        off = np.nan_to_num(np.abs(session.logits(probes) - answers)).max(axis=1)
        noise = np.nan_to_num(independence.rounding(session.logits, probes)).max(axis=1)
        # Not the strict parity of members: these weights may amplify rounding without limit.
        limit = 10 * noise + LOGITS_TOLERANCE * max(1.0, float(np.nan_to_num(np.abs(answers)).max()))
        if (off > limit).any():
            raise ExportError(
                f"The exported network differs from torch by {off.max():.1e} in a logit, before any training. Some layer of the network is "
                "exported wrongly."
            )
        _refuse_probabilities(answers, output_kind.last_operator(onnx.load_from_string(model)))
        if (fault := independence.fault(session.logits, probes)) is not None:
            raise ExportError(
                f"The exported network {fault}. Its forward probably treats a batch of this size differently from the one that torch.export traced."
            )


def fit(config: C, fabric: Fabric, network: nn.Module, data: Data) -> C:
    """Try one training step, and give up the memory layout or the precision if the network does not run in it.

    Returns:
        The options with which it runs; the fabric's precision is set accordingly.

    Raises:
        NetworkError: no step works, or the network does not return logits in training mode.
    """
    choices = [(config.channels_last, False)]
    if config.channels_last:
        choices.append((False, False))
    if hardware.is_reduced(fabric) and config.precision == "auto":
        choices += [(config.channels_last, True), *([(False, True)] if config.channels_last else [])]
    failed: list[Exception] = []
    with _randomness_untouched():
        for channels_last, in_float32 in choices:
            try:
                _step(config, fabric, _copy(network), data, channels_last, in_float32)
            except TrainingError:
                raise
            except Exception as error:  # a network may raise anything
                failed.append(error)
                continue
            if failed:
                dropped = ["channels-last layout"] if channels_last != config.channels_last else []
                dropped += ["bfloat16"] if in_float32 else []
                logger.info(
                    f"note: the network does not run in {' and '.join(dropped)} ({_first_line(failed[0])}); it is trained without"
                )
            if in_float32:
                hardware.use_float32(fabric)
            return config if channels_last == config.channels_last else dataclasses.replace(config, channels_last=False)
    precision = ", or leave out --precision bf16" if config.precision == "bf16" else ""
    raise NetworkError(
        f"The network fails in one training step on {_step_size(config, fabric, data)} images: {_first_line(failed[-1])}. "
        f"Correct its forward in training mode{precision}."
    )


def _step(
    config: Config, fabric: Fabric, network: nn.Module, data: Data, channels_last: bool, in_float32: bool
) -> None:
    device = fabric.device
    network.to(device)
    if channels_last:
        layout.convert(network, torch.channels_last)
    size = _step_size(config, fabric, data)
    images, labels = next(data.train.batches(torch.arange(size), size))
    images, labels = images.to(device), labels.to(device)
    if size > 1:
        images, labels = data.mix(images, labels, torch.Generator().manual_seed(0))
    usual = layout.arrange(Normaliser.of(data).to(device)(images), torch.contiguous_format)
    laid_out = layout.arrange(usual, layout.of(network))
    autocast = contextlib.nullcontext() if in_float32 else fabric.autocast()
    with autocast:
        partial.training_mode(network)
        logits = network(laid_out)
    if config.loss is None and not (isinstance(logits, torch.Tensor) and logits.shape == (size, len(data.classes))):
        given = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise NetworkError(
            f"In training mode the network gives {given} for {size} images; it must give logits ({size}, {len(data.classes)}) as in eval mode. "
            "Auxiliary outputs are for a --loss of your own; else switch them off (torchvision: --network-options aux_logits=False)."
        )
    loss = loop.loss_of(config, data)
    try:
        found = loss(logits.float() if isinstance(logits, torch.Tensor) else logits, labels)
    except Exception as error:
        if config.loss is None:
            raise
        raise ConfigError(
            f"--loss {config.loss} fails on what the network gives in training mode: {_first_line(error)}. It is called with (logits, labels)."
        ) from error
    found.backward()
    with torch.no_grad():
        network(laid_out)  # batch norm is re-estimated in float32
        network.eval()
        network(usual)
        with contextlib.nullcontext() if in_float32 else fabric.autocast():
            network(usual)


def _step_size(config: Config, fabric: Fabric, data: Data) -> int:
    return min(2, max(1, config.batch_size // fabric.world_size), len(data.train))


@torch.no_grad()
def _refuse_writes(served: Normalised, images: torch.Tensor) -> None:
    network = served.network
    first, second = served.normaliser(images).clone(), served.normaliser(images.flip(0)).clone()
    network(first.clone())  # it may fill a cache once
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    shown = second.clone()
    network(shown)
    if not torch.equal(torch.nan_to_num(shown), torch.nan_to_num(second)):
        raise NetworkError(
            "The network writes into the images that it is given (an operation in place, as `x -= …`, or ReLU(inplace=True) as its first "
            "layer). Batch norm is re-estimated and adversarial images are found on the same tensors: work on a copy, `x = x - …`."
        )
    moved = [
        name
        for name, buffer in network.named_buffers()
        if name not in before or before[name].shape != buffer.shape or not torch.equal(before[name], buffer)
    ]
    if moved:
        raise NetworkError(
            f"The network changes its buffer{'s' if len(moved) > 1 else ''} {', '.join(map(repr, moved[:3]))} in eval mode. A served network keeps "
            "nothing from one request to the next, so its outputs would not be those of training: update buffers only `if self.training`."
        )


def _refuse_mixed_rows(served: Normalised, probes: NDArray[np.float32]) -> None:
    def answer(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return served(torch.from_numpy(images)).numpy()

    fault = independence.fault(answer, probes)
    if fault is None and _fill_zeros(served := _copy(served)):
        fault = independence.fault(answer, probes)
    if fault is not None:
        raise NetworkError(
            f"In eval mode the network {fault}. The service puts images of several clients into batches of any size; each must be answered by "
            f"itself. {first_mixing(served, torch.from_numpy(probes)) or ''}".rstrip()
        )


def _fill_zeros(network: nn.Module) -> bool:
    """Replace weights that are all zero, and return whether there were any.

    Heads and residual branches often begin as zeros, and then hide what the layers before them do.
    """
    generator = torch.Generator().manual_seed(0)
    zeros = [p for name, p in network.named_parameters() if not name.endswith("bias") and not p.any()]
    with torch.no_grad():
        for parameter in zeros:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bool(zeros)


def _refuse_probabilities(answers: NDArray[np.float32], last: str | None) -> None:
    kind = output_kind.kind(answers, last)
    if kind == "probs":
        raise NetworkError(
            "The network gives probabilities: its rows lie in [0, 1] and sum to 1, so it ends in softmax. The loss and the temperature of "
            "the ensemble apply softmax themselves. Remove the last softmax; log_softmax may stay."
        )
    if kind == "sigmoid":
        raise NetworkError(
            "The network ends in a sigmoid, so its outputs are not logits of one class out of several. Remove the last sigmoid."
        )


M = TypeVar("M", bound=nn.Module)


def _copy(network: M) -> M:
    try:
        return copy.deepcopy(network)
    except Exception as error:
        raise NetworkError(
            f"The network cannot be copied ({_first_line(error)}), and export needs a copy. A tensor that is computed in __init__ and kept as "
            "an attribute should be a buffer or a parametrization (torch.nn.utils.parametrizations)."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextlib.contextmanager
def _randomness_untouched() -> Iterator[None]:
    # Networks and data sets draw from all of these, and the trial must not affect the training.
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)
