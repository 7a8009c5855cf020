"""Measures loss and error of networks at combinations of weight sets. An interrupted measurement can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm

from models_store.decisions import temperature
from models_store.decisions.calibration import halves
from models_store.store import Version
from models_store.uncertainty import Floats, softmax
from training import data, networks
from training.config import data_options
from training.data import Data, Split, in_order
from training.errors import ConfigError
from training.geometry.vertices import State, combine, coordinates, put_into
from training.members import member, metrics
from training.networks import layout
from training.networks.normaliser import Normaliser

BATCH = 128  # the same as in member.clean_images


@dataclass(frozen=True)
class Subset:
    """Number of images to measure on; None: the whole split."""

    train: int | None = None
    test: int | None = None
    bn: int = 8192

    def describe(self, data: Data) -> str:
        """A description for the reports."""
        counts = [
            min(limit or len(split), len(split)) for limit, split in ((self.train, data.train), (self.test, data.test))
        ]
        return (
            f"Train loss and error on {counts[0]} of {len(data.train)} training images (clean), test on {counts[1]} of {len(data.test)}; "
            f"batch norm re-estimated on {min(self.bn, len(data.train))} at every point."
        )


@dataclass(frozen=True)
class Measured:
    """Measurements of one network. Losses are in nats; errors are shares of the images."""

    train_loss: float  # cross-entropy with L2 penalty, as minimised by SGD
    train_nll: float
    train_error: float
    test_error: float
    test_nll: float
    temperature: float  # fitted on validation
    test_nll_fitted: float  # at this temperature
    test_probs: Floats  # (batch, classes), at temperature 1

    def record(self) -> dict[str, float]:
        """The numbers, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "test_probs"}


class Probe:
    """Measures combinations of vertices."""

    def __init__(
        self, network: nn.Module, data: Data, vertices: Sequence[State], weight_decay: float, subset: Subset,
        device: torch.device,
    ):  # fmt: skip
        """`network` is overwritten; `vertices` are full state dicts of it."""
        self._network, self._data, self._vertices = network.to(device), data, vertices
        self._weight_decay, self._subset, self._device = weight_decay, subset, device
        layout.prefer_channels_last(network, next(member.clean_images(data, 2, device)))
        parameters = [name for name, _ in network.named_parameters()]
        self.positions = coordinates(vertices, parameters)

    def at(self, coefficients: NDArray[np.float64]) -> Measured:
        """Measure the network Σ_v c_v w_v, with batch-norm statistics re-estimated for it."""
        put_into(self._network, combine(self._vertices, coefficients))
        member.settle(self._network, self._data, self._subset.bn, self._device)
        train, train_labels = self._logits(self._data.train, self._subset.train)
        validation, known = self._logits(self._data.validation, None)
        test, labels = self._logits(self._data.test, self._subset.test)
        fitting, _ = halves(len(known))  # as a member's
        own = temperature.fit(validation[None][:, fitting], known[fitting], np.ones(1))
        train_probs, test_probs = softmax(train), softmax(test)
        train_nll = metrics.nll(train_probs, train_labels)
        return Measured(
            train_loss=train_nll + self._weight_decay / 2 * float(np.sum((coefficients @ self.positions) ** 2)),
            train_nll=train_nll,
            train_error=1 - metrics.accuracy(train_probs, train_labels),
            test_error=1 - metrics.accuracy(test_probs, labels),
            test_nll=metrics.nll(test_probs, labels),
            temperature=own,
            test_nll_fitted=metrics.nll(softmax(test, own), labels),
            test_probs=test_probs,
        )

    def error_of_mean(self, *measured: Measured) -> float:
        """Test error of the networks' averaged prediction."""
        rows = in_order(self._data.test)[: self._subset.test]
        labels = torch.cat([labels for _, labels in self._data.test.batches(rows, 4096)]).numpy()
        return 1 - metrics.accuracy(np.mean([one.test_probs for one in measured], axis=0), labels)

    @torch.inference_mode()
    def _logits(self, split: Split, limit: int | None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        order = in_order(split)
        if limit is not None and limit < len(split):  # a fixed random choice: data sets are often sorted
            order = (
                torch.randperm(len(split), generator=torch.Generator().manual_seed(1))[:limit]
                if split is self._data.train
                else order[:limit]
            )
        normalise = Normaliser.of(self._data).to(self._device)
        memory_format = layout.of(self._network)
        self._network.eval()
        logits, labels = [], []
        for images, known in split.batches(order, BATCH):
            normalised = layout.arrange(normalise(images.to(self._device)), memory_format)
            logits.append(self._network(normalised).float().cpu())
            labels.append(known.cpu())
        return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def open_probe(version: Version, files: Sequence[Path], subset: Subset) -> tuple[Probe, Data]:
    """Make a probe of a published version's networks, on the data that it was trained on.

    Args:
        version: its manifest records network, data set and weight decay.
        files: weights of the vertices.
        subset: number of images to measure on.

    Raises:
        ConfigError: the manifest does not record how its networks are built or what they were trained on.
    """
    network, kept = version.manifest.network, version.manifest.provenance.config
    if network is None or "dataset" not in kept:
        raise ConfigError(
            f"{version.name} was imported: its manifest does not record how its networks are built or what they were trained on."
        )
    found = data.load(data_options(kept))
    module = networks.build(network.factory, len(found.classes), found.input, network.kwargs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placed = data.on_device(found, device)
    return Probe(module, placed, [load_file(file) for file in files], kept["weight_decay"], subset, device), placed


class Kept:
    """Results of a measurement, one JSON line each, in a file that belongs to one question."""

    def __init__(self, file: Path, question: dict[str, Any]):
        """Continue the file if it belongs to the same question; else rename it to FILE.before and start a new one."""
        self._file = file
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        lines = _whole_lines(file)
        if not lines or lines[0] != {"question": key}:
            file.parent.mkdir(parents=True, exist_ok=True)
            if lines:
                file.replace(file.with_name(f"{file.name}.before"))
            file.write_text(json.dumps({"question": key}) + "\n")
            lines = [{}]
        self._found = {json.dumps(line["at"]): line["found"] for line in lines[1:]}

    def measure(
        self, questions: Sequence[Any], ask: Callable[[Any], dict[str, float]], what: str
    ) -> list[dict[str, float]]:
        """Returns the result of `ask` for each item; results that are in the file already are not computed again."""
        for question in tqdm(questions, what, leave=False, disable=None):
            if (key := json.dumps(question)) not in self._found:
                self._found[key] = ask(question)
                with self._file.open("a") as out:
                    out.write(json.dumps({"at": question, "found": self._found[key]}) + "\n")
        return [self._found[json.dumps(question)] for question in questions]


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    text = file.read_text()
    if not text.endswith("\n"):  # the process was killed while writing
        text = text[: text.rfind("\n") + 1]
        file.write_text(text)
    return [json.loads(line) for line in text.splitlines()]
