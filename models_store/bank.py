"""Bank: many networks of one path at the cost of its vertices, as a template graph and the weights to put into it.

Interpolating the weights inside the graph would take three to four times a member's time, because fusions and weight
layouts need constants. So the weights of a point are computed here and passed to ONNX Runtime before it optimises.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import (  # pyright: ignore[reportUnknownVariableType]
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save,
)

from models_store.errors import CorruptionError, MemberError
from models_store.graphs.onnx_contract import check_template
from models_store.manifest import MAX_TEMPERATURE, MIN_TEMPERATURE, InputSpec

TEMPLATE, VERTICES, POINTS = "template.onnx", "vertices.safetensors", "points.safetensors"
_STATISTICS = "statistics/"
Weights = dict[str, NDArray[np.float32]]  # initializer name -> value


@dataclass(frozen=True)
class Bank:
    """The points of a path. FORMAT.md specifies the files."""

    template: bytes
    vertices: Weights  # each (vertices, …)
    statistics: Weights  # each (points, …)
    coefficients: NDArray[np.float64]  # (points, vertices)
    temperature: NDArray[np.float64]  # (points,)
    accuracy: NDArray[np.float64]
    nll: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.coefficients)

    def weights(self, point: int) -> Weights:
        """Values of the template's external initializers at a point.

        Args:
            point: 0 … len − 1.
        """
        coefficients = self.coefficients[point].astype(np.float32)
        combined = {name: _combine(stack, coefficients) for name, stack in self.vertices.items()}
        return combined | {name: rows[point] for name, rows in self.statistics.items()}

    def save(self, folder: Path) -> None:
        """Write the three files."""
        folder.mkdir()
        (folder / TEMPLATE).write_bytes(self.template)
        (folder / VERTICES).write_bytes(save(self.vertices))
        points = {"coefficients": self.coefficients, "temperature": self.temperature}
        points |= {"accuracy": self.accuracy, "nll": self.nll}
        points |= {_STATISTICS + name: rows for name, rows in self.statistics.items()}
        (folder / POINTS).write_bytes(save(points))

    @classmethod
    def load(cls, folder: Path) -> Bank:
        """Read the three files.

        Raises:
            CorruptionError: a file cannot be read, or breaks FORMAT.md.
        """
        try:
            template, vertices = (folder / TEMPLATE).read_bytes(), load_file(folder / VERTICES)
            points = load_file(folder / POINTS)
            bank = cls(
                template=template,
                vertices=vertices,
                statistics={k.removeprefix(_STATISTICS): v for k, v in points.items() if k.startswith(_STATISTICS)},
                coefficients=points["coefficients"],
                temperature=points["temperature"],
                accuracy=points["accuracy"],
                nll=points["nll"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptionError(
                f"{folder} is not a bank ({error}): restore it from a copy, or publish again."
            ) from None
        if wrong := bank._broken_rule():
            raise CorruptionError(f"{folder} breaks FORMAT.md: {wrong}. Restore it from a copy, or publish again.")
        return bank

    def _broken_rule(self) -> str | None:
        c = self.coefficients
        if c.ndim != 2 or c.dtype != np.float64 or not np.allclose(c.sum(axis=1), 1):
            return "coefficients are not float64 (points, vertices) with rows that sum to 1"
        for name in ("temperature", "accuracy", "nll"):
            if getattr(self, name).shape != (len(c),) or not np.isfinite(getattr(self, name)).all():
                return f"{name} is not a number for each point"
        if not ((self.temperature >= MIN_TEMPERATURE) & (self.temperature <= MAX_TEMPERATURE)).all():
            return f"a temperature is not from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        for name, stack, rows in [
            *((k, v, c.shape[1]) for k, v in self.vertices.items()),
            *((k, v, len(c)) for k, v in self.statistics.items()),
        ]:
            if stack.dtype != np.float32 or stack.ndim < 1 or len(stack) != rows or not np.isfinite(stack).all():
                return f"{name} is not {rows} finite float32 tensors"
        if both := sorted(self.vertices.keys() & self.statistics.keys()):
            return f"{both[0]} is in both files"
        return None


@dataclass(frozen=True)
class Points:
    """Where the points of a bank lie, and how good each is alone on the validation split."""

    coefficients: NDArray[np.float64]  # (points, vertices)
    accuracy: NDArray[np.float64]  # (points,)
    nll: NDArray[np.float64]

    @classmethod
    def of(cls, bank: Bank) -> Points:
        """Return the points of a bank without its weights."""
        return cls(bank.coefficients, bank.accuracy, bank.nll)

    def positions(self) -> NDArray[np.float64]:
        """The parameter t of each point of a curve, in [0, 1]: (points,).

        Σ k · coefficient_k / (vertices − 1) is t for Bezier curves (the mean of the Bernstein weights) and for polygonal chains.
        """
        vertices = self.coefficients.shape[1]
        return self.coefficients @ np.linspace(0, 1, vertices) if vertices > 1 else np.zeros(len(self.coefficients))


def check_bank(folder: Path, spec: InputSpec, classes: int, points: int) -> None:
    """Check a bank's files against FORMAT.md.

    Raises:
        MemberError: the template breaks FORMAT.md, or the number of points is not `points`.
        CorruptionError: a file cannot be read, or breaks FORMAT.md.
    """
    bank = Bank.load(folder)
    if len(bank) != points:
        raise MemberError(f"{folder} holds {len(bank)} points; its manifest says {points}.")
    shapes = {name: stack.shape[1:] for name, stack in (bank.vertices | bank.statistics).items()}
    check_template(folder / TEMPLATE, spec, classes, shapes)


def _combine(stack: NDArray[np.float32], coefficients: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = coefficients @ stack.reshape(len(stack), -1)
    return flat.reshape(stack.shape[1:])
