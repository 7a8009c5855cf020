"""Builds a bank: many path points that share one template graph. Every point is checked before it is added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from models_store.bank import Bank
from models_store.decisions import temperature
from models_store.decisions.calibration import halves
from models_store.graphs.runtime import MemberSession, in_batches
from models_store.manifest import InputSpec
from models_store.uncertainty import softmax
from training.data import Data, as_arrays
from training.errors import ExportError
from training.geometry.coefficients import Coefficients
from training.geometry.vertices import State, combine, put_into
from training.members import batch_norm, member
from training.members.export import Normalised, check_parity, open_exported, to_open_template
from training.members.metrics import score
from training.networks import layout
from training.runs import Run, load_state, save_state

_NETWORK = "network."  # prefix that Normalised adds to names


def build(
    run: Run,
    network: nn.Module,
    data: Data,
    vertices: Sequence[State],
    coefficients: Coefficients,
    bn_images: int,
    device: torch.device,
    spec: InputSpec,
) -> Bank:
    """Build a bank in which every point gives the same outputs as torch.

    Args:
        run: stores what was computed for each point, so that an interrupted publication resumes.
        network: a module of the right architecture; its weights are overwritten.
        data: as for member.make.
        vertices: weight sets by torch name.
        coefficients: (points, vertices); the bank's points.
        bn_images: number of clean training images on which each point's statistics are re-estimated.
        device: where torch runs.
        spec: what the members take; see Exporter.

    Raises:
        ExportError: at some point, the template with the combined weights does not give torch's outputs.
    """
    images, labels = as_arrays(data.validation)
    fitting, _ = halves(len(labels))
    clean = next(member.clean_images(data, 2, device, layout.of(network)))
    statistics = batch_norm.statistics(network, clean)
    varying = [
        name
        for name, tensor in vertices[0].items()
        if tensor.is_floating_point() and any(not torch.equal(tensor, other[name]) for other in vertices[1:])
    ]
    put_into(network, combine(vertices, coefficients[len(coefficients) // 2]))
    served = Normalised.of(network, data).to(device)
    template, held = to_open_template(served, spec, {_NETWORK + name for name in {*varying, *statistics}})
    stacks = {
        name: np.stack([_array(state[name.removeprefix(_NETWORK)]) for state in vertices])
        for name in sorted(held)
        if name.removeprefix(_NETWORK) not in statistics
    }
    rows = {name: [] for name in sorted(held - stacks.keys())}
    bank = Bank(template, stacks, {}, coefficients, *(np.empty(len(coefficients)) for _ in range(3)))
    for point, row in enumerate(tqdm(coefficients, "bank", leave=False, disable=None)):
        weights = combine(vertices, row)
        file = run.folder / "bank" / f"{point:05d}.safetensors"
        if file.exists():
            put_into(network, {**weights, **load_state(file)})
        else:
            put_into(network, weights)
            member.settle(network, data, bn_images, device)
            state = network.state_dict()
            save_state(file, {name: state[name] for name in statistics})
        state = network.state_dict()
        given = bank.weights(point) | {name: _array(state[name.removeprefix(_NETWORK)]) for name in rows}
        logits = _checked_logits(served, template, given, images, device, held)
        own = temperature.fit(logits[None][:, fitting], labels[fitting], np.ones(1))
        scores = score(softmax(logits, own), labels)
        bank.temperature[point], bank.accuracy[point], bank.nll[point] = own, scores.accuracy, scores.nll
        for name, kept in rows.items():
            kept.append(given[name])
    bank.statistics.update({name: np.stack(kept) for name, kept in rows.items()})
    return bank


def _checked_logits(
    served: Normalised,
    template: bytes,
    weights: dict[str, NDArray[np.float32]],
    images: NDArray[np.float32],
    device: torch.device,
    held: set[str],
) -> NDArray[np.float32]:
    session: MemberSession = open_exported(template, weights)
    try:
        check_parity(served, session, images[: member.PARITY_IMAGES], device)
    except ExportError as error:
        state = {name for name, tensor in served.state_dict().items() if tensor.is_floating_point()}
        lost = sorted(name.removeprefix(_NETWORK) for name in state - held if name.startswith(_NETWORK))
        raise ExportError(
            "the exported graph is not this network with other weights put in, so combined weights do not give the combined network"
            + (
                f" (the graph does not hold {', '.join(lost[:3])}: computed from weights before export?)"
                if lost
                else ""
            )
            + f". {error}"
        ) from None
    return in_batches(session, images)


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    # A copy, because the network's buffers are overwritten for the next point.
    return np.array(tensor.detach().cpu().float().numpy(), order="C")
