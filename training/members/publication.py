"""From collected weights to a published version: the last step of every method."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models_store import manifest
from models_store.bank import Bank
from models_store.decisions import temperature
from models_store.decisions.calibrating import Labelled, measure
from models_store.decisions.calibration import halves
from models_store.store import Store, Version
from models_store.uncertainty import combine, softmax
from training import logger
from training.config import Config
from training.data import Data, as_arrays, seen_images
from training.errors import ExportError
from training.geometry.coefficients import Coefficients, Coordinates
from training.geometry.vertices import State, coordinates
from training.geometry.vertices import combine as combine_states
from training.members import activation, bank, batch_norm, member, quantising
from training.members.activation import Answers
from training.members.export import Exporter
from training.members.metrics import score
from training.members.quantising import Quantiser
from training.runs import Run, load_weights, save_state

LIBRARIES = ("torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy", "lightning-fabric")
Weigh = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]]  # see pipeline.Plan
Vertex = tuple[Path, manifest.Origin]  # a weight set in the run's folder


@dataclass(frozen=True)
class Points:
    """The published networks, as combinations of trained vertices."""

    shape: str
    components: list[list[int]]  # the vertices of each curve in order, or of each simplex
    # Functions of the vertices' coordinates, because what is drawn may depend on volumes:
    members: Callable[[Coordinates], Coefficients]  # (members, vertices): the networks of the average
    # (points, vertices): the networks of the bank, which may be empty
    bank: Callable[[Coordinates], Coefficients]
    summary: Callable[[Coordinates], str] | None = None  # printed after publishing


@dataclass(frozen=True)
class Job:
    """What is published, and where."""

    store: Store
    config: Config
    run: Run
    network: nn.Module  # its weights are overwritten
    data: Data
    device: torch.device
    exporter: Exporter  # may have traced the network already


@dataclass(frozen=True)
class Cost:
    """Cost of the training."""

    seconds: float
    epochs: float  # in units of plain epochs
    device: str  # description of the hardware


@dataclass(frozen=True)
class _Members:
    """The networks that are averaged; their files are in the staging folder."""

    logits: NDArray[np.float32]  # (members, batch, classes), of the validation images
    exact: NDArray[np.float32]  # the same before quantisation
    temperatures: list[float]  # of each member alone
    origins: list[manifest.Origin]
    made: int  # number of exported members, with those left out of the average


def publish(job: Job, vertices: Sequence[Vertex], points: Points | None, weigh: Weigh | None, cost: Cost) -> Version:
    """Turn every point into a member, calibrate their average on validation, and publish.

    Args:
        job: what is published, and where.
        vertices: the trained weight sets.
        points: combinations of them that become members; None: each vertex becomes a member.
        weigh: computes the members' weights; None: equal weights.
        cost: cost of the training.

    Raises:
        ExportError: a member cannot be exported faithfully, or loses too much when it is quantised; then nothing is
            published.
        StoreError: the store cannot be written.
    """
    config, data = job.config, job.data
    images, labels = as_arrays(data.validation)
    # Temperatures and weights come from one half of the validation images; the other half calibrates decisions.
    fitting, _ = halves(len(labels))
    with job.store.staging(config.published_name) as staged:
        if data.tokenizer is not None:
            (staged / manifest.TOKENIZER_FILE).write_bytes(data.tokenizer)
        states = [load_weights(file) for file, _ in vertices] if points else []
        parameters = [name for name, _ in job.network.named_parameters()]
        positions = coordinates(states, parameters) if points else np.zeros((0, 0))
        members = _make_members(job, staged, _weights_of_members(vertices, states, points, positions), labels)
        weights = (
            np.full(len(members.logits), 1 / len(members.logits))
            if weigh is None
            else weigh(members.logits[:, fitting], labels[fitting])
        )
        fitted = temperature.estimate(members.logits[:, fitting], labels[fitting], weights)
        average = score(combine(softmax(members.logits, fitted.temperature), weights).mean_probs, labels)
        rows = points.bank(positions) if points else np.zeros((0, 0))
        quantised = _quantisation(config, members, labels, weights, fitting, average)
        records = _records(members, weights, labels)
        kept_bank = _keep_bank(
            staged,
            rows,
            lambda rows: bank.build(
                job.run, job.network, data, states, rows, config.bn_images, job.device, job.exporter.spec
            ),
        )
        forward = (members.made + len(rows)) * _settling(job.network, data, config.bn_images, job.device)
        draft = manifest.Draft(
            method=config.method,
            network=manifest.Network(factory=config.network, kwargs=config.network_kwargs()),
            input=job.exporter.spec,
            classes=data.classes,
            members=records,
            temperature=fitted.temperature,
            validation=average,
            quantization=quantised,
            geometry=points and _keep_vertices(staged, states, points),
            bank=_describe(kept_bank) if kept_bank else None,
            calibration=measure(
                staged,
                records[0].file,
                Labelled(
                    images, labels, f"the validation split of {config.dataset}", seen_images(data, config.dataset)
                ),
                members.logits,
                weights,
                fitted.temperature,
                members.temperatures,
                kept_bank,
            ),
            provenance=_provenance(job, cost, forward),
        )
        refused = activation.refusal(
            Answers.of(members.logits, labels, weights, fitted.temperature),
            labels,
            activation.given_answers(job.run, job.network, data, len(config.given()), config.bn_images, job.device),
            activation.active_version(job.store, config.published_name),
            fingerprint=data.fingerprint,
            classes=data.classes,
            validation_cut=data.validation_cut,
        )
        activate = config.activate and (refused is None or config.activate_anyway)
        activation.keep_decision(job.run, config.quantize, refused, anyway=activate)
        version = job.store.publish(config.published_name, staged, draft, activate=activate)
    beside = " in addition to the given networks'" if config.given() else ""
    best = max(one.validation.accuracy for one in records if one.validation)
    settled = f", and {forward:.3g} epochs of forward passes for batch norm" if forward else ""
    logger.info(
        f"published {version.name}: {len(records)} member{'s' if len(records) > 1 else ''}, validation accuracy {average.accuracy:.4f} (best member {best:.4f}), "
        f"nll {average.nll:.4f}, temperature {fitted}, cost {cost.epochs:.4g} plain epochs{settled}{beside}\n{version.folder}"
    )
    if points and points.summary:
        logger.info(points.summary(positions))
    if fitted.warning:
        logger.warning(fitted.warning)
    if refused and activate:
        logger.warning(f"activated because of --activate-anyway, although {refused}")
    elif refused and config.activate:
        logger.warning(
            f"NOT ACTIVATED: {refused} It is published, but not served. To serve it anyway, give --activate-anyway, or run: "
            f"python -m models_store activate {version.manifest.name} {version.manifest.version}"
        )
    return version


def _make_members(
    job: Job, staged: Path, weights: Iterator[tuple[State, manifest.Origin]], labels: activation.Labels
) -> _Members:
    """Export each member, and leave out of the average those that are far worse than most."""
    (staged / "members").mkdir()
    (staged / "weights").mkdir()
    origins: list[manifest.Origin] = []
    collected: list[np.ndarray] = []
    exact: list[np.ndarray] = []
    quantiser = Quantiser.of(job.config.quantize, job.data)
    for index, (state, origin) in enumerate(weights):
        made = member.make(job.network, state, job.data, job.config.bn_images, job.device, job.exporter, quantiser)
        (staged / f"members/{index:03d}.onnx").write_bytes(made.onnx)
        save_state(staged / f"weights/{index:03d}.safetensors", made.state)
        origins.append(origin)
        collected.append(made.validation_logits)
        exact.append(made.exact_logits)
    logits = np.stack(collected)
    if quantiser is not None:
        quantising.check_finite(job.config.quantize, logits)
    fitting, _ = halves(len(labels))
    own = [temperature.fit(one[None][:, fitting], labels[fitting], np.ones(1)) for one in logits]
    # In float32, so that what quantisation costs is not hidden by leaving out a member that it has spoilt.
    alone = [Answers.of(one[None][:, fitting], labels[fitting], np.ones(1)) for one in exact]
    kept = _choose(staged, job.config, alone, labels[fitting])
    return _Members(
        logits[kept], np.stack(exact)[kept], [own[i] for i in kept], [origins[i] for i in kept], len(collected)
    )


def _quantisation(
    config: Config,
    members: _Members,
    labels: activation.Labels,
    weights: NDArray[np.float64],
    fitting: NDArray[np.intp],
    average: manifest.Scores,
) -> manifest.Quantization | None:
    """What quantisation cost the average, which has the scores `average`, in comparison with the same members in float32."""
    if config.quantize == "none":
        return None
    fitted = temperature.estimate(members.exact[:, fitting], labels[fitting], weights)
    before = score(combine(softmax(members.exact, fitted.temperature), weights).mean_probs, labels)
    quantising.check_loss(config.quantize, before, average, config.quantize_loss)
    return manifest.Quantization(
        format=config.quantize, inputs=quantising.IMAGES if config.quantize == "int8" else None, float32=before
    )


def _records(members: _Members, weights: NDArray[np.float64], labels: activation.Labels) -> list[manifest.Member]:
    return [
        manifest.Member(
            file=f"members/{index:03d}.onnx",
            weights=f"weights/{index:03d}.safetensors",
            origin=origin,
            weight=float(weights[index]),
            temperature=members.temperatures[index],
            validation=score(softmax(members.logits[index], members.temperatures[index]), labels),
        )
        for index, origin in enumerate(members.origins)
    ]


def _provenance(job: Job, cost: Cost, forward: float) -> manifest.Provenance:
    return manifest.Provenance(
        run=job.run.identity,
        config={"door": job.config.method, **job.config.deciding()},
        commit=_commit(),
        libraries=_libraries(),
        data_fingerprint=job.data.fingerprint,
        wall_seconds=round(cost.seconds, 1),
        epochs_spent=round(cost.epochs, 4),
        epochs_forward=round(forward, 4),
        device=cost.device,
    )


def _choose(staged: Path, config: Config, members: Sequence[Answers], labels: activation.Labels) -> list[int]:
    """Indices of the members that are averaged. The files of the others are removed, and the rest is renumbered."""
    left_out = [] if config.keep_all_members else activation.outliers(members, labels)
    for index in left_out:
        logger.warning(
            f"left out of the average: member {index} of {len(members)}, far worse on validation than most ({members[index]}). "
            "--keep-all-members averages it too, in a new run."
        )
    kept = [index for index in range(len(members)) if index not in left_out]
    for folder, suffix in (("members", "onnx"), ("weights", "safetensors")):
        for index in left_out:
            (staged / folder / f"{index:03d}.{suffix}").unlink()
        for number, index in enumerate(kept):
            (staged / folder / f"{index:03d}.{suffix}").rename(staged / folder / f"{number:03d}.{suffix}")
    return kept


def _settling(network: nn.Module, data: Data, bn_images: int, device: torch.device) -> float:
    """Cost of re-estimating a network's statistics: forward passes, in epochs over the train split."""
    if not batch_norm.statistics(network, next(member.clean_images(data, 2, device))):
        return 0.0
    return min(bn_images, len(data.train)) / len(data.train)


def _weights_of_members(
    vertices: Sequence[Vertex], states: Sequence[State], points: Points | None, positions: Coordinates
) -> Iterator[tuple[State, manifest.Origin]]:
    if points is None:
        for file, origin in vertices:
            yield load_weights(file), origin
        return
    for coefficients in points.members(positions):
        yield combine_states(states, coefficients), manifest.Origin(coefficients=coefficients.tolist())


def _keep_vertices(staged: Path, states: Sequence[State], points: Points) -> manifest.Geometry:
    for index, state in enumerate(states):
        save_state(staged / f"vertices/{index:03d}.safetensors", state)
    return manifest.Geometry(
        shape=points.shape,
        vertices=[f"vertices/{index:03d}.safetensors" for index in range(len(states))],
        components=points.components,
    )


def _keep_bank(staged: Path, rows: Coefficients, build: Callable[[Coefficients], Bank]) -> Bank | None:
    """Build and save the bank. If these networks cannot be in a bank, log the reason and return None."""
    if not len(rows):
        return None
    try:
        built = build(rows)
    except ExportError as error:
        logger.warning(f"no bank: {error} The members are published without one.")
        return None
    built.save(staged / "bank")
    return built


def _describe(built: Bank) -> manifest.Bank:
    return manifest.Bank(
        points=len(built), accuracy_mean=float(built.accuracy.mean()), accuracy_min=float(built.accuracy.min())
    )


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # installed without a checkout
    return found.stdout.strip()


def _libraries() -> dict[str, str]:
    versions: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
