"""Members in fewer bits: int8, for their rate on a CPU and their size; bf16, for their size alone.

int8: weights and activations, by ONNX Runtime's static quantisation (QuantizeLinear and DequantizeLinear around each operator, one
scale for each output channel of a weight, the range of an activation measured on training inputs). bf16: weights are stored in
bfloat16 and converted to float32 when a session is made, because ONNX Runtime computes convolutions and products in bfloat16 on
few devices. What is lost is measured on the validation split.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from models_store.inputs.kinds import Inputs
from models_store.manifest import ONNX_OPSET, Scores
from training.data import Data, seen_images
from training.errors import ExportError

Format = Literal["int8", "bf16"]
IMAGES = 512  # training inputs that the ranges of activations are measured on
_BATCH = 32
# A mask adds a huge negative number. Eight bits that span it hold nothing else, so such sums stay in float32.
_PRODUCTS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


@dataclass(frozen=True)
class Quantiser:
    """Quantises the members of one ensemble."""

    format: Format
    inputs: Inputs  # (n, *shape): training inputs; empty for bf16
    masked: bool = False  # whether the network masks filled-up places, as those for texts do

    @classmethod
    def of(cls, wanted: str, data: Data) -> Quantiser | None:
        """The one that --quantize names; None for "none".

        Args:
            wanted: none, int8 or bf16.
            data: its train split gives the inputs, without augmentation.
        """
        masked = data.input.kind == "tokens"
        if wanted == "int8":
            return cls("int8", seen_images(data, "", IMAGES)[0], masked)
        return cls("bf16", np.zeros((0, *data.shape), np.float32), masked) if wanted == "bf16" else None

    def __call__(self, model: bytes) -> bytes:
        """Quantise an exported member.

        Raises:
            ExportError: ONNX Runtime cannot quantise it.
        """
        try:
            return self._int8(model) if self.format == "int8" else _bf16(model)
        except Exception as error:  # the quantiser raises what happens to fail in it
            raise ExportError(
                f"The member cannot be quantised to {self.format}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
                "Nothing was published; the same command without --quantize publishes the float32 members."
            ) from error

    def _int8(self, model: bytes) -> bytes:
        # Imported where it is needed: commands start sooner.
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):
            def __init__(self, name: str, inputs: Inputs):
                self._batches: Iterator[Mapping[str, Inputs]] = (
                    {name: inputs[i : i + _BATCH]} for i in range(0, len(inputs), _BATCH)
                )

            def get_next(self) -> Mapping[str, Inputs] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
                return next(self._batches, None)

        given = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
        (name,) = (one.name for one in given.graph.input)
        with tempfile.TemporaryDirectory() as folder, _quiet():
            made = Path(folder) / "member.onnx"
            # Weights of 7 bits: on processors without VNNI, products of 8 bits overflow their 16-bit sums.
            quantization.quantize_static(
                given, made, Reader(name, self.inputs), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                reduce_range=True, op_types_to_quantize=_PRODUCTS if self.masked else None, activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
            return _tidied(onnx.load(made)).SerializeToString()


def check_finite(format_: str, logits: NDArray[np.float32]) -> None:
    """Refuse members that give numbers which are not finite.

    Args:
        format_: int8 or bf16.
        logits: (members, batch, classes), of the validation split.

    Raises:
        ExportError: they do.
    """
    if not np.isfinite(logits).all():
        raise ExportError(
            f"In {format_} a member's outputs are not finite; in float32 they are. The network likely computes with numbers too large for {format_}. "
            "Nothing was published; the same command without --quantize publishes the float32 members, without a new training."
        )


def check_loss(format_: str, before: Scores, after: Scores, most: float) -> None:
    """Refuse members whose average lost more than `most` of accuracy (a share) or NLL (nats) on the validation split.

    Raises:
        ExportError: it lost more.
    """
    lost, rose = before.accuracy - after.accuracy, after.nll - before.nll
    if lost <= most and rose <= most:
        return
    raise ExportError(
        f"In {format_} the average of the members has a validation accuracy of {after.accuracy:.4f} and an NLL of {after.nll:.4f}; in float32 "
        f"{before.accuracy:.4f} and {before.nll:.4f}. At most {most:g} may be lost of either (--quantize-loss). Nothing was published; the same "
        "command without --quantize publishes the float32 members, without a new training."
    )


def _bf16(model: bytes) -> bytes:
    found = onnx.load_from_string(model)
    nodes: list[onnx.NodeProto] = []
    for tensor in found.graph.initializer:
        # Vectors and scalars need no space to speak of, and some must not be rounded: the lowest float32 becomes -inf.
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
        tensor.Clear()
        tensor.name, tensor.data_type = f"{name}.bf16", onnx.TensorProto.BFLOAT16
        tensor.dims.extend(values.shape)
        tensor.raw_data = _rounded(values).tobytes()
        nodes.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    rest = list(found.graph.node)
    del found.graph.node[:]
    found.graph.node.extend([*nodes, *rest])
    return found.SerializeToString()


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the domains and annotations that the quantiser adds and no operator uses."""
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    if [entry.version for entry in kept] != [ONNX_OPSET]:
        raise ValueError(f"the quantiser wrote opsets {[(entry.domain, entry.version) for entry in kept]}")
    del model.graph.value_info[:]
    del model.metadata_props[:]
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises to preprocess the model, which the exporter has done
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
