"""A second output of one member's graph: how far the features of an image lie from those of the training images.

The features are the input of the last matrix product. Their squared Mahalanobis distance to the nearest class mean, under
the covariance within the classes, is added to the graph when the version is loaded (Lee et al. 2018, eq. 2), so the file
of the member stays as it was published. FORMAT.md specifies the file of the detector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors import SafetensorError
from safetensors.numpy import load_file, save  # pyright: ignore[reportUnknownVariableType]

from models_store.errors import CorruptionError
from models_store.graphs.onnx_contract import graph_inputs
from models_store.manifest import NOVELTY_FILE, OUTPUT_NAME, Draft, Novelty

NOVELTY_NAME = "modepath_novelty"  # of the output
# Operators that may stand between the last matrix product and the logits: they compute each row alone.
_ROW_BY_ROW = {"Add", "Cast", "DequantizeLinear", "Div", "Flatten", "Identity", "Log", "LogSoftmax", "Max", "Mul", "QuantizeLinear", "Reshape", "Softmax", "Sub"}  # fmt: skip
_PRODUCTS = {"Gemm", "MatMul"}


@dataclass(frozen=True)
class Detector:
    """The distance of features from those of training images, as a part of a member's graph."""

    member: int  # index of the member
    tensor: str  # the value of its graph that holds the features, see `features_of`
    map: NDArray[np.float32]  # (features, features): makes the covariance within classes the identity
    shift: NDArray[np.float32]  # (features,): added after `map`, so that the mean of all classes is 0
    means: NDArray[np.float32]  # (classes, features): mapped and shifted means of the classes

    def attached(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the member with the further output NOVELTY_NAME, (batch,)."""
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        tensors = {
            "map": self.map,
            "shift": self.shift,
            "means": self.means,
            "squares": np.square(self.means).sum(axis=1),
            "axis": np.array([1]),
        }
        copy.graph.initializer.extend(
            numpy_helper.from_array(values, f"{NOVELTY_NAME}.{name}") for name, values in tensors.items()
        )

        def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
            named = [name if name == self.tensor else f"{NOVELTY_NAME}.{name}" for name in inputs]
            return helper.make_node(operator, named, [f"{NOVELTY_NAME}.{output}"], **attributes)

        # |z − m|² = |z|² + (|m|² − 2 z·m): (batch, classes) numbers, not (batch, classes, features)
        copy.graph.node.extend(
            [
                node("Flatten", [self.tensor], "flat", axis=1),
                node("Gemm", ["flat", "map", "shift"], "mapped"),
                node("Gemm", ["mapped", "means", "squares"], "by_class", alpha=-2.0, transB=1),
                node("ReduceMin", ["by_class", "axis"], "least", keepdims=0),
                node("ReduceSumSquare", ["mapped", "axis"], "own", keepdims=0),
            ]
        )
        copy.graph.node.append(
            helper.make_node("Add", [f"{NOVELTY_NAME}.least", f"{NOVELTY_NAME}.own"], [NOVELTY_NAME])
        )
        copy.graph.output.append(helper.make_tensor_value_info(NOVELTY_NAME, TensorProto.FLOAT, ["batch"]))
        return copy

    def attached_to(self, file: Path) -> bytes:
        """Return the member of an ONNX file with the further output, serialised."""
        return self.attached(onnx.load_from_string(file.read_bytes())).SerializeToString()

    def save(self, folder: Path) -> None:
        """Write the file of the detector into a version's folder."""
        (folder / NOVELTY_FILE).write_bytes(save({"map": self.map, "shift": self.shift, "means": self.means}))

    @classmethod
    def load(cls, folder: Path, manifest: Draft) -> Detector | None:
        """Read the detector of a version; None if it has none.

        Raises:
            CorruptionError: the file cannot be read, or breaks FORMAT.md.
        """
        record = manifest.calibration.novelty if manifest.calibration else None
        if record is None:
            return None
        file = folder / NOVELTY_FILE
        try:
            tensors = load_file(file)
            found = cls(record.member, record.tensor, tensors["map"], tensors["shift"], tensors["means"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptionError(
                f"{file} is not a detector of novelty ({error}): restore it from a copy, or publish again."
            ) from None
        if not _is_right(tensors, record, len(manifest.classes)):
            raise CorruptionError(
                f"{file} breaks FORMAT.md: it does not hold finite float32 tensors for {record.features} features. "
                "Restore it from a copy, or publish again."
            )
        return found


def features_of(model: onnx.ModelProto) -> str | None:
    """The value that the last matrix product of a member is applied to; None if the logits are not computed by one."""
    of_images = {value.name for value in graph_inputs(model.graph)}  # the values that depend on what is classified
    made: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        made |= dict.fromkeys(node.output, node)
        if of_images & set(node.input):
            of_images |= set(node.output)
    name = OUTPUT_NAME
    while (node := made.get(name)) is not None:
        inputs = (
            node.input[:1] if node.op_type == "Reshape" else node.input
        )  # its shape may be computed from the images
        computed = [value for value in inputs if value in of_images]
        if len(computed) != 1:
            return None
        name = computed[0]
        if node.op_type in _PRODUCTS:
            return name
        if node.op_type not in _ROW_BY_ROW:
            return None
    return None


def cut_at(model: onnx.ModelProto, tensor: str) -> bytes:
    """The part of a member that computes `tensor`, serialised; its output (batch, features) has the name of logits."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        for i, name in enumerate(node.output):
            if name == OUTPUT_NAME:
                node.output[i] = f"{NOVELTY_NAME}.logits"
    copy.graph.node.append(helper.make_node("Flatten", [tensor], [OUTPUT_NAME], axis=1))
    del copy.graph.output[:]
    copy.graph.output.append(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", None]))
    return copy.SerializeToString()


def _is_right(tensors: Mapping[str, NDArray[np.generic]], record: Novelty, classes: int) -> bool:
    size = record.features
    means = tensors["means"]
    return (
        tensors["map"].shape == (size, size)
        and tensors["shift"].shape == (size,)
        and means.ndim == 2
        and means.shape[1] == size
        and 1 <= len(means) <= classes
        and all(values.dtype == np.float32 and bool(np.isfinite(values).all()) for values in tensors.values())
    )
