"""ONNX Runtime sessions. No other module creates one.

The export check, `training.evaluate` and the service all run members through this module, so that what is measured is
what is served.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import loky as untyped_loky  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import onnxruntime as untyped_onnxruntime  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from models_store.errors import MemberError, ProviderError
from models_store.graphs import merging
from models_store.graphs.novelty import NOVELTY_NAME, Detector
from models_store.manifest import OUTPUT_NAME, Manifest
from models_store.uncertainty import Floats, Prediction, combine, softmax

ProviderChoice = Literal["auto", "cpu", "cuda"]
onnxruntime: Any = untyped_onnxruntime  # both packages ship without types
loky: Any = untyped_loky
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


class MemberSession:
    """One member, ready to run."""

    def __init__(
        self,
        model: Path | bytes,
        providers: ProviderChoice = "auto",
        threads: int | None = None,
        weights: Mapping[str, NDArray[np.float32]] | None = None,
        shares_arena: bool = False,
    ):
        """Create a session.

        Args:
            model: an ONNX file, or its content.
            providers: "auto" uses CUDA if it is available.
            threads: threads that work on one call, including the caller's (default: `default_threads()`).
            weights: the initializers that the model declares external, such as the weights of a point for a bank's
                template.
            shares_arena: allocate activations from one arena, shared by all sessions with this option; for many
                sessions of which few run at once.

        Raises:
            MemberError: ONNX Runtime refuses the model.
            ProviderError: `providers` is "cuda" and CUDA is not available.
        """
        label = "the model" if isinstance(model, bytes) else str(model)
        self._weights = weights  # kept alive, because ONNX Runtime may still read from them
        self._session = _open(model, label, providers, threads or default_threads(), weights, shares_arena)
        self._input: str = self._session.get_inputs()[0].name

    @property
    def providers(self) -> list[str]:
        """Execution providers in actual use."""
        return self._session.get_providers()

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, C, H, W) in [0, 1] -> (batch, classes)."""
        return self._session.run([OUTPUT_NAME], {self._input: images})[0]


class Original:
    """A model as another tool wrote it, to be compared with what it was adapted to."""

    def __init__(self, model: bytes, providers: ProviderChoice = "auto"):
        """Create a session as MemberSession does."""
        self._session = _open(model, "the original model", providers, default_threads())
        self._types: dict[str, str] = {one.name: one.type for one in self._session.get_inputs()}

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return list(self._types)

    def run(self, output: str, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run it; the values are converted to the types of its inputs, and the output to float32."""
        of_type = {
            "float16": np.float16,
            "double": np.float64,
            "uint8": np.uint8,
            "int64": np.int64,
            "int32": np.int32,
            "bool": np.bool_,
        }
        types = {name: of_type.get(kind[7:-1], np.float32) for name, kind in self._types.items()}
        given = {name: np.ascontiguousarray(value, types[name]) for name, value in values.items()}
        found: list[Any] = self._session.run(None, given)
        names = [one.name for one in self._session.get_outputs()]
        if output in names:
            return np.asarray(found[names.index(output)]).astype(np.float32)
        maps: Any = found[[isinstance(one, list) for one in found].index(True)]  # scikit-learn's ZipMap
        return np.array([list(row.values()) for row in maps], np.float32)


class Outputs(NamedTuple):
    """What members compute for a batch."""

    logits: NDArray[np.float32]  # (members, batch, classes)
    novelty: NDArray[np.float32] | None = None  # (batch,); None unless one of these members computes it


class Part:
    """Some members of an ensemble that one thread runs with one call."""

    def __init__(
        self, model: Path | bytes, label: str, providers: ProviderChoice, threads: int, shares_arena: bool = False
    ):
        """Create a session as MemberSession does; `label` names the model in errors."""
        self._session = _open(model, label, providers, threads, shares_arena=shares_arena)
        self._input: str = self._session.get_inputs()[0].name
        names = [output.name for output in self._session.get_outputs()]
        self._logits = [name for name in names if not name.endswith(NOVELTY_NAME)]
        self._novelty = [name for name in names if name.endswith(NOVELTY_NAME)]
        self.providers: list[str] = self._session.get_providers()

    def run(self, images: NDArray[np.float32]) -> Outputs:
        """(batch, C, H, W) in [0, 1] -> the outputs of these members."""
        values = self._session.run([*self._logits, *self._novelty], {self._input: images})
        count = len(self._logits)
        return Outputs(np.stack(values[:count]), values[count] if self._novelty else None)


# Of a model and the threads that are there for one call: the number of threads to use.
Within = Callable[[Path | bytes, int], int]


def all_threads(model: Path | bytes, most: int) -> int:
    """Use all threads for each call."""
    return most


class EnsembleSession:
    """All members of one published version, ready to run. Several threads may call it at once."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        providers: ProviderChoice = "auto",
        threads: int | None = None,
        choose: Within = all_threads,
    ):
        """Create the sessions.

        Args:
            folder: the version's folder.
            manifest: the version's manifest.
            providers: see MemberSession.
            threads: threads that work on one batch; see MemberSession.
            choose: the number of threads of each member on a CPU, of those that are left over for it.

        Raises:
            MemberError: ONNX Runtime refuses a model.
            ProviderError: see MemberSession.
        """
        if _resolve(providers) != [CPU]:
            choose = all_threads
        self.manifest = manifest
        threads = threads or default_threads()
        files = [folder / member.file for member in manifest.members]
        detector = Detector.load(folder, manifest)
        # Members run in parallel: 12 small ones on 2 cores process 1318 images/s with one thread per member, and 1109
        # with both threads on each member in turn. Threads within a member get only the cores that are left over.
        self._at_once = min(threads, len(files))
        within = threads // self._at_once
        models = merging.load_to_merge(files)
        if models is not None and (merging.shares(models) or self._at_once < len(files)):
            if detector is not None:
                models[detector.member] = detector.attached(models[detector.member])
            # Members that share a backbone run in one graph, which computes it once.
            together = 1 if merging.shares(models) else self._at_once
            within = threads // together
            groups = [list(range(first, len(files), together)) for first in range(together)]
            joined = [merging.merged([models[i] for i in group]) for group in groups]
            self.parts = [Part(model, f"the members of {folder}", providers, choose(model, within)) for model in joined]
        else:
            groups = [[i] for i in range(len(files))]
            self.parts = [
                Part(
                    detector.attached_to(file) if detector and detector.member == i else file,
                    str(file),
                    providers,
                    choose(file, within),
                    shares_arena=len(files)
                    > 1,  # else each large member would keep the activations of its largest batch
                )
                for i, file in enumerate(files)
            ]
        self._order = np.argsort(np.concatenate(groups))
        self._weights: Floats = np.array([member.weight for member in manifest.members])

    @property
    def providers(self) -> list[str]:
        """Execution providers in actual use."""
        return self.parts[0].providers

    def run(self, images: NDArray[np.float32]) -> Outputs:
        """(batch, C, H, W) in [0, 1] -> the outputs of all members."""
        collected = [Outputs(images)] * len(self.parts)
        numbers = iter(range(len(self.parts)))  # shared by the threads: the next free one takes the next part

        def work() -> None:
            for number in numbers:
                collected[number] = self.parts[number].run(images)

        _share(work, self._at_once - 1)
        return self.joined(collected)

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, C, H, W) in [0, 1] -> (members, batch, classes)."""
        return self.run(images).logits

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        """Join the parts' outputs, with the logits in the order of the members."""
        novelty = next((part.novelty for part in parts if part.novelty is not None), None)
        return Outputs(np.concatenate([part.logits for part in parts])[self._order], novelty)

    def run_in_batches(self, images: NDArray[np.float32], size: int = 256) -> Outputs:
        """The outputs of all members for many images, `size` at a time."""
        parts = [self.run(images[i : i + size]) for i in range(0, len(images), size)]
        novelty = [part.novelty for part in parts if part.novelty is not None]
        return Outputs(
            np.concatenate([part.logits for part in parts], axis=1), np.concatenate(novelty) if novelty else None
        )

    def probs(self, logits: NDArray[np.float32]) -> Floats:
        """Each member's distribution at the ensemble's temperature, with the shape of the logits."""
        return softmax(logits, self.manifest.temperature)

    def member_probs(self, images: NDArray[np.float32]) -> Floats:
        """(batch, C, H, W) in [0, 1] -> each member's distribution: (members, batch, classes)."""
        return self.probs(self.logits(images))

    def combine(self, member_probs: Floats, novelty: NDArray[np.float32] | None = None) -> Prediction:
        """Mode `average`: the weighted mean of the members' distributions."""
        return combine(member_probs, self._weights, novelty)

    def predict(self, images: NDArray[np.float32]) -> Prediction:
        """Answer many images in the mode `average`."""
        outputs = self.run_in_batches(images)
        return self.combine(self.probs(outputs.logits), outputs.novelty)


class Group:
    """Some members of a version that run one after another in a cascade: one graph if they are small, else one for each."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        members: Sequence[int],
        providers: ProviderChoice = "auto",
        threads: int | None = None,
        choose: Within = all_threads,
    ):
        """See EnsembleSession; `members` are numbers of members."""
        if _resolve(providers) != [CPU]:
            choose = all_threads
        threads = threads or default_threads()
        files = [folder / manifest.members[member].file for member in members]
        if len(files) > 1 and (models := merging.load_to_merge(files)) is not None:
            self.parts = [Part(merging.merged(models), f"members of {folder}", providers, 1)]
        else:
            within = max(1, threads // len(files))
            self.parts = [
                Part(file, str(file), providers, choose(file, within), shares_arena=len(files) > 1) for file in files
            ]


def in_batches(
    session: MemberSession | EnsembleSession,
    images: NDArray[np.float32],
    size: int = 256,
) -> NDArray[np.float32]:
    """Logits of many images, `size` at a time; the batch axis is the second to last."""
    return np.concatenate([session.logits(images[i : i + size]) for i in range(0, len(images), size)], axis=-2)


def available_cores() -> int:
    """Number of cores that this process may use, given its CPU affinity and its container's quota."""
    return loky.cpu_count()


def default_threads() -> int:
    """$MODEPATH_THREADS, or the number of available cores.

    Raises:
        ProviderError: the variable is not a number of threads.
    """
    given = os.environ.get("MODEPATH_THREADS", "0")
    if not given.isdecimal():
        raise ProviderError(f"$MODEPATH_THREADS must be a number of threads, or 0 for all cores; got {given!r}.")
    return int(given) or available_cores()


def _share(work: Callable[[], None], others: int) -> None:
    """Run `work` in this thread and in `others` more threads at once."""
    shared = [_helpers().submit(work) for _ in range(others)]
    work()
    for one in shared:
        one.result()


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    # One pool per process, because all its ensembles share the same cores.
    return ThreadPoolExecutor(default_threads(), "members")


def _open(
    model: Path | bytes,
    label: str,
    providers: ProviderChoice,
    threads: int,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
    shares_arena: bool = False,
) -> Any:
    wanted = _resolve(providers)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A pool that spins while idle takes cores away from all other work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if shares_arena:
        _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if weights:
        # Not add_initializer: it sets the weights only after fusions have already used those of the template.
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight) for weight in weights.values()]
        options.add_external_initializers(list(weights), values)
    options.log_severity_level = 3  # its warnings name no cause a user could act on
    # TF32 would round inputs to 10 bits, so the outputs would differ from those that were checked at export.
    named = [(CUDA, {"use_tf32": "0"}) if provider == CUDA else provider for provider in wanted]
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=named
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise MemberError(f"ONNX Runtime refuses {label}: {error}") from None
    if session.get_providers()[0] != wanted[0]:  # ONNX Runtime falls back silently
        raise ProviderError(
            f"{wanted[0]} was requested, but {label} runs on {session.get_providers()[0]}: its CUDA libraries did "
            "not load. Install the extra `modepath[cuda]`, or set providers to cpu."
        )
    return session


@functools.cache
def _register_arena() -> None:
    info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(info, None)


def _resolve(choice: ProviderChoice) -> list[str]:
    if choice == "cpu" or (choice == "auto" and not _gpu_present()):
        return [CPU]
    if CUDA not in onnxruntime.get_available_providers():
        if choice == "auto":
            return [CPU]
        raise ProviderError(
            "providers is cuda, but this onnxruntime was built without it: install onnxruntime-gpu, or set cpu."
        )
    if not _gpu_present():
        raise ProviderError("providers is cuda, but no GPU answers on this machine: check the driver, or set cpu.")
    _preload_cuda_libraries()
    return [CUDA, CPU]


@functools.cache
def _preload_cuda_libraries() -> None:
    onnxruntime.preload_dlls()


@functools.cache
def _gpu_present() -> bool:
    # onnxruntime-gpu lists CUDA as available on machines without a GPU, so the driver is asked.
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
