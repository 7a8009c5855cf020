"""Which published versions share networks. Whoever knows one of them knows something of the other.

A *mark* stands for a tensor, or for a model's file. It is a digest of all bits, or a sketch: a few projections, which a copy keeps where it
was rounded. Marks are bytes, so that sets of them can be joined, compared and sent to another process as they are.
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
LEAST = 32  # elements of a constant that counts
SKETCHED = 64  # elements of a tensor that is sketched
# Two tensors of one size are near when they differ by less than this, each with its mean removed and divided by its norm.
# benchmarks/training/lineage.py: rounding to bfloat16 changes 0.0016; networks of different initial weights differ by 1, of the same ones that
# saw the images in another order by 0.016 at least. One that was trained on briefly at a small rate is near, and is a relative.
NEAR = 0.005
PROJECTIONS = 16
# Of a tensor that a few elements decide, such as variances with one large channel, two networks may have nearly the same.
SPREAD = 8
_BUCKETS = 1024
_CHUNK = 2**20
_DIGEST_BYTES = 16
_CELL = 0.25  # side of the cells in which near sketches are looked for
_REACH = NEAR * math.sqrt(PROJECTIONS)
_Sketches = tuple[NDArray[np.int64], NDArray[np.float32]]  # sizes; (sketches, PROJECTIONS)


def marks(version: Version) -> Marks:
    """Of its members' files, and of each tensor that was trained, of members and vertices.

    Two versions are related when they have a network, or a part of one, in common: exactly, or but for rounding to half precision or
    bfloat16 (`related`). Larger changes hide it: deliberate noise, pruning, quantisation to int8, longer training, and weights that an
    exporter multiplied with others. What training does not decide marks nothing: tensors of one number repeated (a bias at 0), of longer integers,
    and those that all the version's networks share (a table of positions; but also a frozen backbone, which others may have from elsewhere).

    Raises:
        LineageError: nothing of a network can be compared.
        CorruptionError: a file is no regular file.
        OSError: a file cannot be read.
    """
    manifest, folder = version.manifest, version.folder
    held = [member.weights for member in manifest.members if member.weights]
    held += manifest.geometry.vertices if manifest.geometry else []
    models = [bytes.fromhex(manifest.files[member.file]) for member in manifest.members]
    by_network = [_of_tensors(_weights(folder / file)) for file in held]
    # Of networks that came as ONNX, what the graph holds: the same network may be published from its weights, too.
    by_network += [_of_tensors(_constants(folder / one.file)) for one in manifest.members if not one.weights]
    if not all(by_network):
        raise LineageError(
            f"A network of {version.name} holds no weights that could be compared: whether it is another ensemble's cannot be known."
        )
    found = frozenset[bytes]().union(*by_network)
    return (found - _of_all(by_network)).union(models)


def related(one: Marks, other: Marks) -> bool:
    """Have two versions a network, or a part of one, in common?"""
    return len(families({"one": one, "other": other})) == 1


def families(marked: Mapping[str, Marks]) -> list[set[str]]:
    """Names of versions that share networks, directly or through others; those that share with none by themselves."""
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
    # Sketches that several have are joined already: each is looked at once.
    sketches = [mark for mark in owner if _is_sketch(mark)]
    for one, other in _near_pairs(sketches):
        join(owner[sketches[one]], owner[sketches[other]])
    return [found for name, found in family.items() if name == min(found)]


def _of_all(by_network: Sequence[Marks]) -> Marks:
    """What every network has: exactly, or, where they do not have all their tensors so, nearly."""
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
    # Where all is near, they are copies of one network, and that is what is to be known again.
    return exact | near if near < set(sketches) else exact


def _near_pairs(sketches: Sequence[bytes]) -> Iterable[tuple[int, int]]:
    """Pairs of places whose tensors have one size and are near."""
    sizes, values = _read(sketches)
    # No coordinate of two near sketches differs by more than the reach: each is looked for in its own cell and across its close borders.
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
        if tensor.dtype.name == "bfloat16":  # which numpy knows from onnx alone, and not as a number
            tensor = tensor.astype(np.float32)
        # Quantised weights are bytes; other integers are shapes and indices.
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
    """Projections of the tensor, standardised, in which distances are kept; its size before them. None where few elements decide."""
    with np.errstate(over="ignore"):
        flat = tensor.astype(np.float32).reshape(-1)
    if not np.isfinite(flat).all():
        return None
    centred = flat - flat.mean(dtype=np.float64).astype(np.float32)
    squares = np.square(centred, dtype=np.float64)
    total = float(squares.sum())
    if total == 0 or total**2 < SPREAD * float(np.square(squares).sum()):
        return None
    # First signs and sums, which cost one pass, then a projection of these.
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
    """A model's larger tensors; matrices both ways round, because exporters turn them."""
    files.check_regular(file, MAX_MODEL_BYTES)
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
