"""Weights that the user gives: checkpoint files, and members of published ensembles."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar as _scalar
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from models_store import file_kind
from models_store.errors import MemberError
from models_store.graphs import onnx_contract
from models_store.store import Store, Version
from training.errors import CheckpointError
from training.geometry.vertices import put_into
from training.runs import state_dicts


@dataclass(frozen=True)
class Given:
    """Weights given by the user."""

    file: Path
    version: Version | None = None  # the published ensemble that they belong to
    part: str | None = None  # which of several sets of weights of the file

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the splits that these weights were trained on; None if it is unknown."""
        return self.version and self.version.manifest.provenance.data_fingerprint


def find(reference: str, store: Store) -> Given:
    """Find a checkpoint file, FILE or FILE#PART, or the weights of a published member, NAME[@VERSION]/INDEX.

    Raises:
        CheckpointError: the reference is a whole ensemble, or the member does not exist or has no weights.
        StoreError: the ensemble does not exist.
    """
    file, part = Path(reference), None
    if not file.exists() and "#" in reference:
        plain, _, part = reference.rpartition("#")
        file = Path(plain)
    name, slash, index = reference.rpartition("/")
    if not file.exists() and not slash and index.partition("@")[0] in store.names():
        raise CheckpointError(f"{reference} is an ensemble; name one of its networks: {reference}/0, {reference}/1, …")
    if file.exists() or not slash or "/" in name or not index.isdecimal():
        return Given(file, part=part)
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


def load_into(network: nn.Module, file: Path, part: str | None = None, *, reset_head: bool = False) -> tuple[str, ...]:
    """Load a checkpoint's weights into a network.

    Reads safetensors, also in several files, and torch files with `weights_only=True`, whatever their suffix.
    state_dicts.py finds the weights in them.

    Args:
        network: the network.
        file: a file, an index of several safetensors files, or a folder that holds one of them.
        part: see state_dicts.find, as reset_head.
        reset_head: whether the last layer may have another number of classes.

    Returns:
        Notes for the log.

    Raises:
        CheckpointError: the file is unreadable, has no weights, or belongs to another network.
    """
    found = state_dicts.find(network, _read(_within(file)), str(file), part, reset_head=reset_head)
    if any(not torch.isfinite(tensor).all() for tensor in found.weights.values() if tensor.is_floating_point()):
        raise CheckpointError(
            f"{file} holds NaN or infinite weights: its training had diverged. Use an earlier checkpoint."
        )
    put_into(network, found.weights, strict=False)
    return found.notes


def _within(file: Path) -> Path:
    """The weights in a folder, as libraries write them."""
    if not file.is_dir():
        return file
    for name in ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"):
        if (file / name).is_file():
            return file / name
    raise CheckpointError(
        f"{file} is a folder without model.safetensors or pytorch_model.bin; give the file of the weights."
    )


def _shards(index: Path) -> dict[str, torch.Tensor]:
    """Weights in several safetensors files, by their index."""
    try:
        names = json.loads(index.read_text())["weight_map"]
        files = sorted({str(name) for name in names.values()})
        if any("/" in name or "\\" in name for name in files):
            raise ValueError("it names files outside its folder")
        parts = [load_file(index.parent / name) for name in files]
    except (OSError, KeyError, AttributeError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error}.") from None
    return {name: tensor for part in parts for name, tensor in part.items()}


# Objects of checkpoints beside tensors: they hold values, and reading them runs no code of the file.
_PLAIN = [argparse.Namespace, np.dtype, _scalar, PosixPath, *(type(np.dtype(kind)) for kind in "fdilqb?")]


def _read(file: Path) -> Any:
    if file.name.endswith(".index.json") and file.is_file():
        return _shards(file)
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
            # Given a path, torch would look at the suffix.
            with file.open("rb") as handle, torch.serialization.safe_globals(_PLAIN):
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
