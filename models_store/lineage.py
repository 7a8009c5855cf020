"""Which published versions share networks. Whoever knows one of them knows something of the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from models_store.errors import LineageError
from models_store.store import Version

Marks = frozenset[bytes]
LEAST = 32


def marks(version: Version) -> Marks:
    """Digests of its members' files, and of each tensor that was trained, of members and vertices.

    Two versions share a network, or a part of one, when they have a mark in common. What training does not decide marks
    nothing: tensors of one number repeated (a bias at 0), of longer integers, and those that all the version's networks share (a table of
    positions; but also a frozen backbone, which others may have from elsewhere).

    Raises:
        LineageError: nothing of a network can be compared.
    """
    manifest = version.manifest
    files = [member.weights for member in manifest.members if member.weights]
    files += manifest.geometry.vertices if manifest.geometry else []
    models = [bytes.fromhex(manifest.files[member.file]) for member in manifest.members]
    by_network = [_digests(load_file(version.folder / file).values()) for file in files]
    # Of networks that came as ONNX, what the graph holds: the same network may be published from its weights, too.
    by_network += [_digests(_constants(version.folder / one.file)) for one in manifest.members if not one.weights]
    if not all(by_network):
        raise LineageError(
            f"A network of {version.name} holds no weights that could be compared: whether it is another ensemble's cannot be known."
        )
    found = frozenset[bytes]().union(*by_network)
    of_all = found.intersection(*by_network) if len(set(by_network)) > 1 else frozenset[bytes]()
    return (found - of_all).union(models)


def families(marked: dict[str, Marks]) -> list[set[str]]:
    """Names of versions that share networks, directly or through others; those that share with nobody by themselves."""
    found: list[set[str]] = []
    for name in marked:
        near = [family for family in found if any(marked[name] & marked[other] for other in family)]
        found = [family for family in found if family not in near] + [{name}.union(*near)]
    return found


def _constants(file: Path) -> Iterable[np.ndarray]:
    """A model's larger tensors; matrices both ways round, because exporters turn them."""
    for held in _tensors(onnx.load(file).graph):  # pyright: ignore[reportUnknownMemberType]
        tensor = numpy_helper.to_array(held)
        if tensor.size < LEAST:  # what images are normalised with is everybody's
            continue
        yield tensor
        if tensor.ndim == 2:
            yield np.ascontiguousarray(tensor.T)


def _tensors(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    """Initializers and constants, those of subgraphs, too."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
            yield from _tensors(inner)


def _digests(tensors: Iterable[np.ndarray]) -> Marks:
    # Quantised weights are bytes; other integers are shapes and places.
    numbers = (one for one in tensors if one.dtype.kind == "f" or one.dtype.itemsize == 1)
    trained = (one for one in numbers if one.size > 1 and (one != one.flat[0]).any())
    return frozenset(
        hashlib.blake2b(one.tobytes() + str(one.shape).encode(), digest_size=16).digest() for one in trained
    )
