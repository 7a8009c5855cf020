"""The pipeline shared by all methods: data, network, run, legs of training, points between weights, publication.

A method describes its own part in a Plan: how to train, and which points of the trained weights become members.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from models_store.manifest import Origin
from models_store.store import Store, Version
from training import logger
from training.config import Config
from training.data import Data
from training.errors import CheckpointError, DivergenceError, ExportError
from training.geometry.vertices import State
from training.members import activation, publication, quantising
from training.members.export import Exporter
from training.members.publication import Cost, Job, Points, Weigh
from training.optimisation import hardware, trial
from training.optimisation.loop import Leg
from training.optimisation.session import Session
from training.runs import PREFIXED, NetworkPrint, Run, checkpoint, save_state
from training.runs.checkpoint import Given

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Trained:
    """What `Plan.build_vertices` works with, once the legs are trained."""

    network: nn.Module  # its weights may be overwritten
    data: Data
    device: torch.device


@dataclass(frozen=True)
class Plan:
    """What a method trains and publishes with the given options."""

    legs: list[Leg]
    vertices: Sequence[tuple[Path, Origin]]  # files of the weight sets that exist after training
    points: Points | None = None  # members between the vertices; None: each vertex is a member
    note: str | None = None  # printed before training begins
    # Builds vertices from the collected weights if the legs do not train them directly. It runs again after a crash.
    build_vertices: Callable[[Trained], None] | None = None
    # Weights of the members, (members,), from their validation logits (members, batch, classes) and the labels
    # (batch,); None: equal weights.
    weigh: Weigh | None = None


def run(config: C, plan: Callable[[C, Run, int], Plan]) -> Version:
    """Train, resuming an interrupted run if there is one, and publish. A finished run is not repeated.

    Args:
        config: the method's options.
        plan: (options, run, iterations in an epoch) -> Plan. `run.start_file("fresh-0")` … hold networks with new
            initial weights, `run.start_file("given-0")` … the weights that `config.given()` names.
    """
    store = Store()
    store.check_writable(config.published_name)
    session = Session.open(config)
    loaded, network = session.data, session.network
    # The same command resumes from the weights that it began with, whatever has been published under those names since.
    identity, code = config.deciding(), NetworkPrint.of(network, loaded.input)
    begun_from = None if config.fresh else Run.begun_from(config.method, identity, code)
    references = begun_from
    if references is None:
        references = [checkpoint.pinned(reference, store) for reference in config.given()]
    config = config.beginning_from(references)
    given = [checkpoint.find(reference, store) for reference in references]
    starts = [_state(network, weights, config.reset_head) for weights in given]
    _warn_of(given, loaded, config)
    exporter = Exporter(loaded.input)
    if begun_from is None:  # a run that exists has passed this check
        trial.check(network, loaded, exporter)
    config = trial.fit(config, session.fabric, network, loaded)
    session = dataclasses.replace(session, config=config)
    depends_on = {
        "the data set": loaded.fingerprint,
        **{str(weights.file): _digest(weights.file) for weights in given},
    }
    leader = session.fabric.is_global_zero
    with contextlib.ExitStack() as stack:
        with session.fabric.rank_zero_first():
            this_run = stack.enter_context(
                Run.open(
                    config.method,
                    identity,
                    depends_on,
                    fresh=config.fresh,
                    network=code,
                    given=references,
                    leader=leader,
                )
            )
            if leader:
                _write_starts(session, this_run, starts)
        quantize = None if config.quantize == "none" else config.quantize
        if (done := store.find_run(config.published_name, this_run.identity, quantize)) is not None:
            logger.info(
                f"already finished: this run published {config.published_name}@{done}. Nothing to do; --fresh trains again."
            )
            _warn_of_loss(store.load(config.published_name, done), config)
            if leader and config.activate:
                _activate_late(store, config.published_name, done, this_run, config)
        else:
            logger.info(f"run {this_run.folder} on {hardware.describe(session.fabric)}")
            _train_and_publish(session, config, plan, store, this_run, exporter)
            done = store.find_run(config.published_name, this_run.identity, quantize)
        return store.load(config.published_name, done)


def _train_and_publish(
    session: Session, config: C, plan: Callable[[C, Run, int], Plan], store: Store, run: Run, exporter: Exporter
) -> None:
    fabric = session.fabric
    planned = plan(config, run, session.steps_per_epoch)
    if planned.note:
        logger.info(planned.note)
    with _weights_named(run):
        if config.ray:
            from training.cluster import tasks  # few need it

            seconds = tasks.train(session, run, planned.legs, plan)
        else:
            seconds = session.train(run, planned.legs)
        if fabric.is_global_zero:
            on_device = session.data_on_device
            if planned.build_vertices:
                planned.build_vertices(Trained(session.network, on_device, fabric.device))
            passes = sum(leg.iterations * leg.passes for leg in planned.legs)
            job = Job(store, config, run, session.network, on_device, fabric.device, exporter)
            cost = Cost(seconds, passes / session.steps_per_epoch * config.passes, hardware.describe(fabric))
            publication.publish(job, planned.vertices, planned.points, planned.weigh, cost)
    fabric.barrier()


def _write_starts(session: Session, run: Run, given: Sequence[State]) -> None:
    for index, state in enumerate(given):
        _save_start(run.start_file(f"given-{index}"), state)
    for index in range(session.config.initial_networks()):
        _save_start(run.start_file(f"fresh-{index}"), session.initialised(index).state_dict())


def _warn_of(given: Sequence[Given], loaded: Data, config: Config) -> None:
    # Networks of another split, or of an unknown one, may have been trained on our validation images.
    if all(weights.fingerprint == loaded.fingerprint for weights in given):
        return
    if loaded.validation_cut:
        logger.warning(
            "the validation images were set aside from the training images just now. If the given network was trained on "
            "them, the validation scores are too good and the temperature too low; use a data set with its own validation split."
        )
    if loaded.mean and (config.mean is None or config.std is None):
        logger.warning(
            f"the given network gets images normalised by mean {_numbers(loaded.mean)} and std {_numbers(loaded.std)}, the values of this "
            "data set. If it was trained with other values, its predictions are wrong: give those with --mean and --std."
        )


def _warn_of_loss(version: Version, config: Config) -> None:
    quantised, scores = version.manifest.quantization, version.manifest.validation
    if quantised is None or scores is None:
        return
    try:
        quantising.check_loss(quantised.format, quantised.float32, scores, config.quantize_loss)
    except ExportError:
        logger.warning(
            f"{version.name} was published with a larger --quantize-loss than {config.quantize_loss:g}: accuracy {scores.accuracy:.4f} and NLL "
            f"{scores.nll:.4f}, in float32 {quantised.float32.accuracy:.4f} and {quantised.float32.nll:.4f}. It stays as it is."
        )


def _activate_late(store: Store, name: str, version: int, run: Run, config: Config) -> None:
    """Activate a published version if the run was stopped before doing so, or if --activate-anyway is new."""
    refused = activation.activation_refused(run, config.quantize)
    if refused is not None and config.activate_anyway:
        store.activate(name, version)
        activation.keep_decision(run, config.quantize, refused, anyway=True)
        logger.warning(f"{name}@{version} is active now because of --activate-anyway, although {refused}")
    elif refused is not None:
        logger.warning(f"NOT ACTIVATED: {refused} To serve it anyway, give --activate-anyway.")
    elif store.finish_activation(name, version):
        logger.info(f"{name}@{version} is active now: the run was stopped before activating it.")


@contextlib.contextmanager
def _weights_named(run: Run) -> Iterator[None]:
    try:
        yield
    except (DivergenceError, ExportError) as error:
        kept = f"Weights from before the failure are kept in {run.folder}." if run.has_weights() else ""
        raise type(error)(f"{error} {kept}".strip()) from error


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def collected(run: Run, legs: Sequence[Leg], steps: int) -> list[tuple[Path, Origin]]:
    """Every weight set that the legs collect, in order, numbered from 1."""
    found: list[tuple[Path, Origin]] = []
    spent = 0
    for index, leg in enumerate(legs):
        for number in range(len(leg.collect) * leg.weight_sets):
            epoch = (spent + leg.collect[number // leg.weight_sets]) / steps
            origin = Origin(cycle=len(found) + 1, epoch=epoch, leg=leg.label)
            found.append((run.vertex_file(index, number), origin))
        spent += leg.iterations * leg.passes
    return found


def _state(network, weights: Given, reset_head: bool) -> State:
    for note in checkpoint.load_into(network, weights.file, weights.part, reset_head=reset_head):
        logger.info(note)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _save_start(file: Path, state: State) -> None:
    if not file.exists():  # it exists if the run is resumed
        save_state(file, {f"network.{name}": tensor for name, tensor in state.items()}, PREFIXED)


def _digest(file: Path) -> str:
    try:
        files = sorted(one for one in file.rglob("*") if one.is_file()) if file.is_dir() else [file]
        return hashlib.sha256(b"".join(one.read_bytes() for one in files)).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
