"""Find which published versions share networks. An attacker who knows one of them knows something about the other.

A *mark* identifies a tensor, or a model's file. It is either a digest of all bits, or a sketch: a few random
projections, which change little when the weights are rounded. Marks are bytes, so that sets of them can be merged,
compared and sent to another process without conversion.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from models_store import files
from models_store.errors import LineageError
from models_store.graphs.onnx_contract import MAX_MODEL_BYTES
from models_store.store import MAX_WEIGHTS_BYTES, Version

Marks = frozenset[bytes]
LEAST = 32  # smaller constants of a graph are ignored (number of elements)
SKETCHED = 64  # smaller tensors get no sketch (number of elements)
# Two tensors of equal size are near if their distance is below this, after each is centred and divided by its norm.
# Measured by benchmarks/training/lineage.py: rounding to bfloat16 moves a tensor by 0.0016. Networks with different initial
# weights differ by 1; with the same initial weights but another order of the images, by at least 0.016. A network that
# was trained a little further at a small rate is near, and counts as related.
NEAR = 0.005
PROJECTIONS = 16
# Minimum effective number of elements, (Σ x²)² / Σ x⁴, of a sketched tensor. A tensor dominated by a few elements, such
# as variances with one large channel, may be nearly equal in two unrelated networks.
SPREAD = 8
_BUCKETS = 1024
_CHUNK = 2**20
_DIGEST_BYTES = 16
_CELL = 0.25  # side of the grid cells in which near sketches are searched
_REACH = NEAR * math.sqrt(PROJECTIONS)
_Sketches = tuple[NDArray[np.int64], NDArray[np.float32]]  # sizes; (sketches, PROJECTIONS)


def marks(version: Version) -> Marks:
    """Marks of a version's member files, and of each trained tensor of its members and vertices.

    Two versions are related if they share a network or a part of one, exactly or up to rounding to half precision or
    bfloat16 (see `related`). Larger changes hide the relation: deliberate noise, pruning, quantisation to int8, longer
    training, and weights that an exporter multiplied with others.

    Tensors that do not identify a network get no mark: those that repeat one number (a bias at 0), those of integers
    wider than a byte, and those that all networks of the version share (a table of positions; but also a frozen
    backbone, which unrelated versions may have from the same source).

    Raises:
        LineageError: a network has no weights that can be compared.
        CorruptionError: a file is not a regular file, or is too large.
        OSError: a file cannot be read.
    """
    manifest, folder = version.manifest, version.folder
    held = [member.weights for member in manifest.members if member.weights]
    held += manifest.geometry.vertices if manifest.geometry else []
    models = [bytes.fromhex(manifest.files[member.file]) for member in manifest.members]
    by_network = [_of_tensors(_weights(folder / file)) for file in held]
    # Imported networks have no weights file. Their graph's constants are used, because the same network may also be
    # published from its weights.
    by_network += [_of_tensors(_constants(folder / one.file)) for one in manifest.members if not one.weights]
    if not all(by_network):
        raise LineageError(
            f"A network of {version.name} holds no weights that can be compared, "
            "so it is unknown whether another ensemble shares it."
        )
    found = frozenset[bytes]().union(*by_network)
    return (found - _of_all(by_network)).union(models)


def related(one: Marks, other: Marks) -> bool:
    """True if the versions with these marks share a network or a part of one."""
    return len(families({"one": one, "other": other})) == 1


def families(marked: Mapping[str, Marks]) -> list[set[str]]:
    """Group the names of versions that share networks, directly or through others; each name is in one group only."""
    family = {name: {name} for name in marked}

    def join(one: str, other: str) -> None:
        if family[one] is not family[other]:
            family[one] |= family[other]
            for name in family[other]:
                family[name] = family[one]

    owner: dict[bytes, str] = {}
    for name, found in marked.items():
        for mark in found:
            join(owner.setdefault(mark, name), name)
    # Versions with an identical sketch are joined already, so each sketch is compared once.
    sketches = [mark for mark in owner if _is_sketch(mark)]
    for one, other in _near_pairs(sketches):
        join(owner[sketches[one]], owner[sketches[other]])
    return [found for name, found in family.items() if name == min(found)]


def _of_all(by_network: Sequence[Marks]) -> Marks:
    """Marks that all networks have: exactly, or nearly unless that applies to every sketch. Empty if all are equal."""
    if len(set(by_network)) == 1:
        return frozenset()
    exact = by_network[0].intersection(*by_network)
    sketches = sorted(mark for mark in frozenset[bytes]().union(*by_network) if _is_sketch(mark))
    networks = {mark: {i for i, held in enumerate(by_network) if mark in held} for mark in sketches}
    seen = {mark: set(found) for mark, found in networks.items()}
    for one, other in _near_pairs(sketches):
        seen[sketches[one]] |= networks[sketches[other]]
        seen[sketches[other]] |= networks[sketches[one]]
    near = {mark for mark, found in seen.items() if len(found) == len(by_network)}
    # If every sketch is near, the networks are copies of one, and these marks are needed to recognise it.
    return exact | near if near < set(sketches) else exact


def _near_pairs(sketches: Sequence[bytes]) -> Iterable[tuple[int, int]]:
    """Pairs of indices of sketches whose tensors have equal size and are near."""
    sizes, values = _read(sketches)
    # Each coordinate of two near sketches differs by at most the reach, so a sketch is searched in its own cell and in
    # those across nearby borders.
    low = np.floor((values[:, :4] - _REACH) / _CELL).astype(int).tolist()
    high = np.floor((values[:, :4] + _REACH) / _CELL).astype(int).tolist()
    home = np.floor(values[:, :4] / _CELL).astype(int).tolist()
    cells: dict[tuple[int, ...], list[int]] = {}
    for place, size in enumerate(sizes.tolist()):
        for cell in itertools.product(*({a, b} for a, b in zip(low[place], high[place], strict=True))):
            for other in cells.get((size, *cell), ()):
                if np.linalg.norm(values[place] - values[other]) < _REACH:
                    yield place, other
        cells.setdefault((size, *home[place]), []).append(place)


def _of_tensors(tensors: Iterable[np.ndarray]) -> Marks:
    found: set[bytes] = set()
    for tensor in tensors:
        if tensor.dtype.name == "bfloat16":  # onnx registers this type with numpy, but its kind is not float
            tensor = tensor.astype(np.float32)
        # Quantised weights are one byte wide; wider integers are shapes and indices.
        if (tensor.dtype.kind != "f" and tensor.dtype.itemsize != 1) or tensor.size < 2:
            continue
        if (tensor != tensor.flat[0]).any():
            found.add(_digest(tensor))
            if tensor.size >= SKETCHED and (sketch := _sketch(tensor)):
                found.add(sketch)
    return frozenset(found)


def _digest(tensor: np.ndarray) -> bytes:
    return hashlib.blake2b(tensor.tobytes() + str(tensor.shape).encode(), digest_size=_DIGEST_BYTES).digest()


def _sketch(tensor: np.ndarray) -> bytes | None:
    """The tensor's size, then random projections of the standardised tensor, which preserve distances.

    None if the tensor is not finite, is constant, or is dominated by a few elements.
    """
    with np.errstate(over="ignore"):
        flat = tensor.astype(np.float32).reshape(-1)
    if not np.isfinite(flat).all():
        return None
    centred = flat - flat.mean(dtype=np.float64).astype(np.float32)
    squares = np.square(centred, dtype=np.float64)
    total = float(squares.sum())
    if total == 0 or total**2 < SPREAD * float(np.square(squares).sum()):
        return None
    # Random signs and sums into buckets come first, because they take one pass; the buckets are then projected.
    bits, buckets = np.random.PCG64(0), np.zeros(_BUCKETS)
    for begin in range(0, flat.size, _CHUNK):
        part = centred[begin : begin + _CHUNK]
        rows = -(-part.size // _BUCKETS)
        part = np.pad(part, (0, rows * _BUCKETS - part.size))
        signs = np.unpackbits(bits.random_raw(-(-part.size // 64)).view(np.uint8))[: part.size]
        buckets += np.where(signs, part, -part).reshape(rows, _BUCKETS).sum(axis=0, dtype=np.float64)
    raw = np.random.PCG64(1).random_raw(PROJECTIONS * _BUCKETS // 64).view(np.uint8)
    projected = np.where(np.unpackbits(raw).reshape(PROJECTIONS, _BUCKETS), 1.0, -1.0) @ buckets / math.sqrt(total)
    return flat.size.to_bytes(8, "little") + projected.astype("<f4").tobytes()


def _is_sketch(mark: bytes) -> bool:
    return len(mark) == 8 + 4 * PROJECTIONS


def _read(sketches: Sequence[bytes]) -> _Sketches:
    table = np.frombuffer(b"".join(sketches), np.dtype([("size", "<i8"), ("values", "<f4", (PROJECTIONS,))]))
    return table["size"], table["values"]


def _weights(file: Path) -> Iterable[np.ndarray]:
    files.check_regular(file, MAX_WEIGHTS_BYTES)
    return load_file(file).values()


def _constants(file: Path) -> Iterable[np.ndarray]:
    """A model's larger tensors. Matrices are also yielded transposed, because exporters transpose them."""
    files.check_regular(file, MAX_MODEL_BYTES)
    for held in _tensors(onnx.load(file).graph):  # pyright: ignore[reportUnknownMemberType]
        tensor = numpy_helper.to_array(held)
        if tensor.size < LEAST:  # unrelated networks share small tensors, such as the mean for normalisation
            continue
        yield tensor
        if tensor.ndim == 2:
            yield np.ascontiguousarray(tensor.T)


def _tensors(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    """Initializers and constants of a graph and its subgraphs."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
            yield from _tensors(inner)
