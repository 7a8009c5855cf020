"""The folder of one training run: what it needs to go on after being killed at any moment.

    $MODEPATH_RUNS/<door>-<hash of the config>/
      run.json                identity, config, and what the run depends on
      checkpoint.safetensors  weights and momenta after the last finished epoch; where that was is in the metadata
      starts/*.safetensors   checkpoints that later legs begin from
      vertices/00-000.safetensors   weights as they were collected: leg, number
      samples/000.safetensors       weights drawn from a distribution over those

Every file is written beside its place and renamed, so each is whole or absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

from training.errors import CheckpointError, RunError
from training.geometry.vertices import State

FORMAT = 1
# Metadata of files whose names say network.… and momentum.…; without it names are the network's own, whatever they begin with.
PREFIXED = {"names": "prefixed"}


@dataclass(frozen=True)
class Progress:
    """How far a run is: `epoch` epochs of leg `leg` are finished."""

    leg: int = 0
    epoch: int = 0
    seconds: float = 0.0


class Run:
    """One run's folder, locked while it is open."""

    def __init__(self, folder: Path, identity: str):
        self.folder = folder
        self.identity = identity

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        door: str,
        config: dict[str, Any],
        depends_on: dict[str, str],
        *,
        fresh: bool,
        given: Sequence[str] = (),
        leader: bool = True,
    ) -> Iterator[Run]:
        """The run of this config: a new one, or the one that was begun.

        Args:
            door: the method.
            config: everything that decides what the run computes; its hash names the folder.
            depends_on: fingerprints of data and code that the config names but does not hold.
            fresh: forget what was done.
            given: the weights that it begins from, by name and version; kept for `begun_from`.
            leader: of the processes that train one run together, one locks and writes; the others open it after it did.

        Raises:
            RunError: another process works on it, or what it depends on has changed.
        """
        folder = _folder(door, config)
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
                write_whole(file, json.dumps(record, indent=2).encode())
            record = json.loads(file.read_text())
            if changed := sorted(k for k, v in depends_on.items() if record["depends_on"].get(k) != v):
                raise RunError(
                    f"{' and '.join(changed)} changed since this run began ({folder}); going on would mix two trainings. "
                    "Train anew with --fresh."
                )
            yield cls(folder, record["run"])

    @staticmethod
    def begun_from(door: str, config: dict[str, Any]) -> list[str] | None:
        """The weights that this config's run begins from, where it was begun: names may have got new versions since."""
        file = _folder(door, config) / "run.json"
        return json.loads(file.read_text()).get("given") if file.exists() else None

    def progress(self) -> Progress:
        """How far the run is."""
        file = self.folder / "checkpoint.safetensors"
        if not file.exists():
            return Progress()
        with _reading(file) as handle:
            meta = handle.metadata() or {}
        return Progress(int(meta["leg"]), int(meta["epoch"]), float(meta["seconds"]))

    def save_checkpoint(self, state: State, progress: Progress) -> None:
        """Remember where the run is."""
        meta = {"leg": str(progress.leg), "epoch": str(progress.epoch), "seconds": str(progress.seconds)}
        save_state(self.folder / "checkpoint.safetensors", state, meta)

    def has_weights(self) -> bool:
        """Whether something trained is kept in it."""
        return (self.folder / "checkpoint.safetensors").exists()

    def load_checkpoint(self) -> State:
        """Weights and momenta after the last finished epoch."""
        return load_state(self.folder / "checkpoint.safetensors")

    def start_file(self, key: str) -> Path:
        """A checkpoint that a leg begins from."""
        return self.folder / "starts" / f"{key}.safetensors"

    def vertex_file(self, leg: int, index: int) -> Path:
        """The weights that leg `leg` collected `index`-th, from 0."""
        return self.folder / "vertices" / f"{leg:02d}-{index:03d}.safetensors"

    def sample_file(self, index: int) -> Path:
        """The `index`-th weights that were drawn, from 0."""
        return self.folder / "samples" / f"{index:03d}.safetensors"


def _folder(door: str, config: dict[str, Any]) -> Path:
    text = json.dumps(config, sort_keys=True)
    key = hashlib.sha256(f"{FORMAT}\n{text}".encode()).hexdigest()[:16]
    return Path(os.environ.get("MODEPATH_RUNS") or "runs") / f"{door}-{key}"


def save_state(file: Path, state: State, metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name, whole or not at all. Tied weights are written once for each of their names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory. Its own writer hides a full disk behind an error of its own.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    write_whole(file, safetensors.torch.save(plain, metadata))


def load_state(file: Path) -> State:
    """Tensors by name.

    Raises:
        CheckpointError: missing or damaged.
    """
    with _reading(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict


def load_weights(file: Path) -> State:
    """A full state dict, from a vertex or from what a leg begins from."""
    with _reading(file) as handle:
        prefixed = (handle.metadata() or {}).items() >= PREFIXED.items()
    state = load_state(file)
    if not prefixed:
        return state
    return {name.removeprefix("network."): t for name, t in state.items() if name.startswith("network.")}


def write_whole(file: Path, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    temporary = file.with_name(f".{file.name}.new")
    with temporary.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), "pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); train anew with --fresh.") from None
