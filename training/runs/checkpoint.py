"""Weights that the user gives: checkpoint files, and members of published ensembles."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from models_store import file_kind
from models_store.errors import MemberError
from models_store.graphs import onnx_contract
from models_store.store import Store, Version
from training.errors import CheckpointError
from training.geometry.vertices import put_into

WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "network", "net")
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Given:
    """Weights given by the user."""

    file: Path
    version: Version | None = None  # the published ensemble that they belong to

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the splits that these weights were trained on; None if it is unknown."""
        return self.version and self.version.manifest.provenance.data_fingerprint


def find(reference: str, store: Store) -> Given:
    """Find a checkpoint file, or the weights of a published member, NAME[@VERSION]/INDEX.

    Raises:
        CheckpointError: the reference is a whole ensemble, or the member does not exist or has no weights.
        StoreError: the ensemble does not exist.
    """
    file = Path(reference)
    name, slash, index = reference.rpartition("/")
    if not file.exists() and not slash and index.partition("@")[0] in store.names():
        raise CheckpointError(f"{reference} is an ensemble; name one of its networks: {reference}/0, {reference}/1, …")
    if file.is_file() or not slash or "/" in name or not index.isdecimal():
        return Given(file)
    version = store.resolve(name)
    members = version.manifest.members
    if int(index) >= len(members) or (weights := members[int(index)].weights) is None:
        raise CheckpointError(
            f"{version.name} has no member {index} with stored weights ({len(members)} members, counted from 0; "
            "imported ones have none)."
        )
    return Given(version.folder / weights, version)


def members(reference: str, store: Store) -> list[str]:
    """References to all members, if `reference` is the name of a published ensemble; else the reference itself.

    Raises:
        StoreError: the ensemble does not have this version.
    """
    name = reference.partition("@")[0]
    if Path(reference).is_file() or "/" in reference or name not in store.names():
        return [reference]
    version = store.resolve(reference)
    return [f"{version.name}/{index}" for index in range(len(version.manifest.members))]


def pinned(reference: str, store: Store) -> str:
    """A reference to a published member with its version added, NAME@VERSION/INDEX; any other reference unchanged.

    Raises:
        StoreError: the ensemble does not have this version.
    """
    name, slash, index = reference.rpartition("/")
    if Path(reference).exists() or not slash or not index.isdecimal() or name.partition("@")[0] not in store.names():
        return reference
    return f"{store.resolve(name).name}/{index}"


def load_into(network: nn.Module, file: Path) -> None:
    """Load a checkpoint's weights into a network.

    Reads safetensors, and torch files with `weights_only=True`, whatever their suffix. Unwraps `state_dict`, and strips
    the prefixes that DataParallel and torch.compile add to names.

    Raises:
        CheckpointError: the file is unreadable, has no weights, or belongs to another network.
    """
    state = _strip(_unwrap(_read(file), file))
    own = network.state_dict()
    # Counters are not weights, and older checkpoints lack them.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    foreign = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or foreign or shapes:
        told = [
            f"{what} {_some(names)}"
            for what, names in (("lacks", missing), ("has besides", foreign), ("has", shapes))
            if names
        ]
        raise CheckpointError(
            f"{file} belongs to another network: it {', '.join(told)}. Give the --network (and --network-options) it was trained with."
        )
    if any(not torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point()):
        raise CheckpointError(
            f"{file} holds NaN or infinite weights: its training had diverged. Use an earlier checkpoint."
        )
    put_into(network, state, strict=False)


def _read(file: Path) -> Any:
    try:
        kind = file_kind.kind(file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} does not exist, neither as a file nor as a published ensemble (see python -m models_store list)."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        # By the content, not by the name: people rename files.
        if kind == "safetensors":
            return load_file(file)
        if kind == "torch":
            with file.open("rb") as handle:  # given a path, torch would look at the suffix
                return torch.load(handle, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (
            f"it holds {blocked[1]}, an object and not a plain tensor"
            if blocked
            else "it holds more than plain tensors"
        )
        raise CheckpointError(
            f"{file} cannot be read as a checkpoint: {what}. Save the weights alone, torch.save(network.state_dict(), …); a pickled module "
            "or another object is not read, because reading it would run its code."
        ) from None
    except Exception:  # both libraries raise many kinds of exceptions
        raise CheckpointError(
            f"{file} cannot be read as a checkpoint: it is damaged, or its download was cut short."
        ) from None
    advice = "Give safetensors, or a .pt that holds a state_dict of plain tensors."
    if _is_onnx(file):
        advice = "It is an ONNX model, which can be served but not trained: use python -m models_store import."
    raise CheckpointError(f"{file} cannot be read as a checkpoint: it {file_kind.said(file)}. {advice}")


def _is_onnx(file: Path) -> bool:
    try:
        onnx_contract.load(file)
    except MemberError:
        return False
    return True


def _unwrap(content: Any, file: Path) -> dict[str, torch.Tensor]:
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{file} holds no state_dict: save one with torch.save(network.state_dict(), ...).")
    return content


def _strip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    while any(all(name.startswith(prefix) for name in state) for prefix in PREFIXES):
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
