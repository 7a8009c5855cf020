"""How many threads run one call of a member: measured once for each model and machine.

More threads than a small network can use make it slower: a call of `preresnet8` on one image takes 0.20 ms with one thread and 0.36 ms
with two. Members of an ensemble run in parallel in any case, which is at least as fast as all threads on each in turn; the choice is
about the threads that are left over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as untyped_onnxruntime  # pyright: ignore[reportMissingTypeStubs]
from pydantic import TypeAdapter, ValidationError

from models_store import files
from models_store.errors import StoreWriteError
from models_store.graphs.runtime import MemberSession
from models_store.inputs import kinds
from models_store.inputs.kinds import Inputs
from models_store.manifest import InputSpec

ROWS = (1, 8)  # of a call that is measured: one request, and a batch
ROUNDS = 20
SECONDS = 2.0  # that the rounds of one model may take, and the round that begins before
MARGIN = 1.1  # more threads must be faster by this factor
_KEPT = TypeAdapter(dict[str, int])
log = logging.getLogger("bentoml.modepath")


@dataclass(frozen=True)
class Measured:
    """Chooses the number of threads for models that take the same input, by a measurement that is kept."""

    spec: InputSpec
    kept: Path | None  # the file that holds measurements

    @classmethod
    def of(cls, spec: InputSpec) -> Measured:
        """Keep measurements in the cache folder."""
        folder = files.cache_folder()
        return cls(spec, folder and folder / "threads.json")

    def __call__(self, model: Path | bytes, most: int) -> int:
        """The number of threads for calls of a CPU session on this model, from 1 to `most`.

        Models that differ in their weights alone are measured once. The measurement is kept where the cache can be
        written; else it is repeated at each start.

        Raises:
            MemberError: ONNX Runtime refuses the model.
        """
        if most == 1:
            return 1
        content = model if isinstance(model, bytes) else model.read_bytes()
        if self.kept is None:
            return _measure(content, self.spec, most)
        key = _key(content, most)
        if 1 <= (chosen := _read(self.kept).get(key, 0)) <= most:
            return chosen
        try:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            # Under the lock: processes that start together would disturb each other's measurement.
            with files.locked(self.kept.with_suffix(".lock")):
                found = _read(self.kept)
                if not 1 <= found.get(key, 0) <= most:
                    found[key] = _measure(content, self.spec, most)
                    files.replace(self.kept, json.dumps(found))
                return found[key]
        except (OSError, StoreWriteError) as error:
            log.debug("%s cannot be written, so threads are measured at each start: %s", self.kept, error)
            return _measure(content, self.spec, most)


def choose(times: Sequence[Sequence[float]], counts: Sequence[int]) -> int:
    """The smallest count that is nearly as fast as the fastest.

    Args:
        times: for each size of a call, the time with each count.
        counts: numbers of threads, ascending.
    """
    slower = [
        sum(time / min(row) for time, row in zip(of_count, times, strict=True)) for of_count in zip(*times, strict=True)
    ]
    return next(count for count, score in zip(counts, slower, strict=True) if score <= MARGIN * min(slower))


def _measure(model: bytes, spec: InputSpec, most: int) -> int:
    counts = sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})
    inputs = [kinds.noise(spec, rows) for rows in ROWS]
    # One session at a time: each holds the weights.
    of_count = [_times(MemberSession(model, "cpu", threads=count), inputs, SECONDS / len(counts)) for count in counts]
    times = list(zip(*of_count, strict=True))
    chosen = choose(times, counts)
    log.info(
        "each member runs with %d of %d threads; measured: %s (calls of %s rows)", chosen, most,
        "; ".join(", ".join(f"{count}: {1000 * one:.2f} ms" for count, one in zip(counts, row, strict=True)) for row in times), " and ".join(map(str, ROWS)),
    )  # fmt: skip
    return chosen


def _times(session: MemberSession, inputs: Sequence[Inputs], seconds: float) -> list[float]:
    """The shortest time of a call with each of the inputs."""
    for given in inputs:
        session.logits(given)  # the first call allocates
    found = [float("inf")] * len(inputs)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for number, given in enumerate(inputs):
            start = time.perf_counter()
            session.logits(given)
            found[number] = min(found[number], time.perf_counter() - start)
        if time.perf_counter() - began > seconds:
            break
    return found


def _read(file: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValidationError):  # a damaged file is measured anew
        return _KEPT.validate_json(file.read_bytes())
    return {}


def _key(model: bytes, most: int) -> str:
    machine = f"{most} {_processor()} {os.cpu_count()} {untyped_onnxruntime.__version__}"
    return hashlib.sha256(hashlib.sha256(_structure(model)).digest() + machine.encode()).hexdigest()


def _structure(model: bytes) -> bytes:
    """The model without the values of its weights."""
    found = onnx.ModelProto.FromString(model)
    for tensor in found.graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT64:  # shapes and axes
            kind, dims, name = tensor.data_type, list(tensor.dims), tensor.name
            tensor.Clear()
            tensor.name, tensor.data_type = name, kind
            tensor.dims.extend(dims)
    return found.SerializeToString(deterministic=True)


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
