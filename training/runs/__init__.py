"""The folder of one training run: all that is needed to resume it after it was killed at any moment.

    $MODEPATH_RUNS/<method>-<hash of the config>/
      run.json                identity, config, what the run depends on, and what its network is
      checkpoint.safetensors  weights and momenta after the last finished epoch; the metadata hold leg and epoch
      starts/*.safetensors   checkpoints that later legs start from
      vertices/00-000.safetensors   weights as they were collected: leg, number
      samples/000.safetensors       weights drawn from a distribution over those

Every file is written under a temporary name and renamed, so that each is complete or absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from models_store.inputs import kinds
from models_store.manifest import InputSpec
from training.errors import CheckpointError, RunError
from training.geometry.vertices import State

FORMAT = 1
PRINT_IMAGES = 4
# Marks files of training state, whose tensor names begin with `network.` or `momentum.`. Unmarked files hold a plain
# state dict.
PREFIXED = {"names": "prefixed"}


@dataclass(frozen=True)
class Progress:
    """Progress of a run: `epoch` epochs of leg `leg` are finished."""

    leg: int = 0
    epoch: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class NetworkPrint:
    """A fingerprint of a network's code: what it computes with the seeded initial weights.

    Two runs with the same configuration are the same run only if their fingerprints agree.
    """

    initial: State  # parameters and buffers with the seeded initial weights, by torch name
    logits: list[list[float]]  # of a fixed batch at these weights, in eval mode

    @classmethod
    def of(cls, network: nn.Module, spec: InputSpec) -> NetworkPrint:
        """Compute it from a network with its initial weights. Keeps torch's random state."""
        images = torch.linspace(0, 1, PRINT_IMAGES * math.prod(spec.shape)).view(PRINT_IMAGES, *spec.shape)
        if spec.kind == "tokens":
            images = torch.from_numpy(kinds.noise(spec, PRINT_IMAGES))
        training = network.training
        with torch.no_grad(), torch.random.fork_rng([]):
            logits = network.eval()(images).float().tolist()
        network.train(training)
        return cls({name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}, logits)

    def record(self) -> dict[str, Any]:
        """The fingerprint as JSON values."""
        return {"state": self._layout(), "logits": self.logits}

    def is_of(self, record: dict[str, Any], folder: Path) -> bool:
        """True if a run, by its record, was begun with this network.

        Logits are compared within rounding, because processors differ in the last bits. A run that was begun before
        networks were recorded is compared by its initial weights.
        """
        if (known := record.get("network")) is not None:
            same_shape = np.shape(known["logits"]) == np.shape(self.logits)
            alike = same_shape and np.allclose(known["logits"], self.logits, rtol=1e-3, atol=1e-4, equal_nan=True)
            return known["state"] == self._layout() and alike
        start = next(iter(sorted((folder / "starts").glob("*.safetensors"))), None)
        if start is None:
            return True
        began = load_weights(start)
        if {name: tuple(tensor.shape) for name, tensor in began.items()} != {
            name: tuple(tensor.shape) for name, tensor in self.initial.items()
        }:
            return False
        # Weights given by the user do not depend on the seed: only their layout can be compared.
        return not start.name.startswith("fresh-0") or all(
            torch.allclose(tensor.float(), began[name].float(), atol=1e-6) for name, tensor in self.initial.items()
        )

    def _layout(self) -> list[list[Any]]:
        return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in self.initial.items()]


class Run:
    """One run's folder, locked while it is open."""

    def __init__(self, folder: Path, identity: str):
        self.folder = folder
        self.identity = identity

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        method: str,
        config: dict[str, Any],
        depends_on: dict[str, str],
        *,
        fresh: bool,
        network: NetworkPrint | None = None,
        given: Sequence[str] = (),
        leader: bool = True,
    ) -> Iterator[Run]:
        """Open the run of this configuration, or begin it.

        Args:
            method: name of the method.
            config: everything that decides what the run computes; its hash names the folder.
            depends_on: fingerprints of data and weights that the config refers to.
            fresh: delete an earlier run of this configuration first.
            network: fingerprint of the network's code. A run of the same configuration with another fingerprint is
                another run, in its own folder.
            given: references to the weights that the run starts from, with versions; stored for `begun_from`.
            leader: True in the one process that locks the folder and writes to it. The other processes that train the
                run open it after the leader has.

        Raises:
            RunError: another process is training this run, or something in `depends_on` has changed.
        """
        folder = _folder(method, config, network)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            try:
                if leader:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"Another process is training in {folder}; wait for it, or change the seed.") from None
            if leader and fresh and folder.exists():
                shutil.rmtree(folder)
            file = folder / "run.json"
            if leader and not file.exists():
                folder.mkdir(exist_ok=True)
                record = {"format": FORMAT, "run": uuid.uuid4().hex, "given": list(given), "depends_on": depends_on}
                record["config"] = config
                if network is not None:
                    record["network"] = network.record()
                write_whole(file, json.dumps(record, indent=2).encode())
            record = json.loads(file.read_text())
            if changed := sorted(k for k, v in depends_on.items() if record["depends_on"].get(k) != v):
                raise RunError(
                    f"{' and '.join(changed)} changed since this run began ({folder}); resuming would mix two trainings. "
                    "Start again with --fresh."
                )
            yield cls(folder, record["run"])

    @staticmethod
    def begun_from(method: str, config: dict[str, Any], network: NetworkPrint | None = None) -> list[str] | None:
        """References to the weights that this run started from, with versions; None for a new run."""
        file = _folder(method, config, network) / "run.json"
        return json.loads(file.read_text()).get("given") if file.exists() else None

    def progress(self) -> Progress:
        """The progress at the last finished epoch."""
        file = self.folder / "checkpoint.safetensors"
        if not file.exists():
            return Progress()
        with _reading(file) as handle:
            meta = handle.metadata() or {}
        return Progress(int(meta["leg"]), int(meta["epoch"]), float(meta["seconds"]))

    def save_checkpoint(self, state: State, progress: Progress) -> None:
        """Store weights and momenta together with the progress of the run."""
        meta = {"leg": str(progress.leg), "epoch": str(progress.epoch), "seconds": str(progress.seconds)}
        save_state(self.folder / "checkpoint.safetensors", state, meta)

    def has_weights(self) -> bool:
        """Returns whether the folder holds trained weights."""
        return (self.folder / "checkpoint.safetensors").exists()

    def load_checkpoint(self) -> State:
        """Weights and momenta after the last finished epoch."""
        return load_state(self.folder / "checkpoint.safetensors")

    def start_file(self, key: str) -> Path:
        """File of a checkpoint that a leg starts from."""
        return self.folder / "starts" / f"{key}.safetensors"

    def vertex_file(self, leg: int, index: int) -> Path:
        """File of the `index`-th weights that leg `leg` collects, from 0."""
        return self.folder / "vertices" / f"{leg:02d}-{index:03d}.safetensors"

    def sample_file(self, index: int) -> Path:
        """File of the `index`-th weights that are sampled, from 0."""
        return self.folder / "samples" / f"{index:03d}.safetensors"


def _folder(method: str, config: dict[str, Any], network: NetworkPrint | None) -> Path:
    """The folder of the run with this configuration and network, or of a new one."""
    text = json.dumps(config, sort_keys=True)
    key = hashlib.sha256(f"{FORMAT}\n{text}".encode()).hexdigest()[:16]
    base = Path(os.environ.get("MODEPATH_RUNS") or "runs") / f"{method}-{key}"
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        file = folder / "run.json"
        if network is None or not file.exists() or network.is_of(json.loads(file.read_text()), folder):
            return folder
    raise AssertionError("counting does not end")


def save_state(file: Path, state: State, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors, completely or not at all. Tied weights are written once for each of their names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory. Its own file writer does not report a full disk as OSError.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    write_whole(file, safetensors.torch.save(plain, metadata))


def load_state(file: Path) -> State:
    """Read named tensors.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with _reading(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict


def load_weights(file: Path) -> State:
    """Read a full state dict, from a vertex file or from a checkpoint that a leg starts from."""
    with _reading(file) as handle:
        prefixed = (handle.metadata() or {}).items() >= PREFIXED.items()
    state = load_state(file)
    if not prefixed:
        return state
    return {name.removeprefix("network."): t for name, t in state.items() if name.startswith("network.")}


def load_start(file: Path) -> State:
    """Read what a leg starts from: weights and momenta, with prefixed names. Momenta missing in the file start at 0.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with _reading(file) as handle:
        prefixed = (handle.metadata() or {}).items() >= PREFIXED.items()
    state = load_state(file)
    return state if prefixed else {f"network.{name}": tensor for name, tensor in state.items()}


def write_whole(file: Path, content: bytes) -> None:
    """Write a small file, completely or not at all."""
    temporary = file.with_name(f".{file.name}.new")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError as error:
        error.filename = error.filename or str(file)  # a write sets none; the error would seem to concern the store
        raise


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), "pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); start again with --fresh.") from None
