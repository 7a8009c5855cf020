"""Make members of ONNX files that were made elsewhere.

A foreign model is brought to the contract (names of input and output, opset, weights inside, normalisation and a log
for models that end in softmax added to the graph) and then run: what cannot be brought there is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models_store.errors import MemberError
from models_store.manifest import INPUT_NAME, ONNX_OPSET, OUTPUT_NAME, Draft, InputSpec, Member, Origin
from models_store.onnx_contract import dimensions, graph_inputs, load, refuse_unknown_domains
from models_store.runtime import MemberSession
from models_store.store import Store, Version


@dataclass(frozen=True)
class ImportOptions:
    """What a foreign file does not say about itself."""

    input_shape: tuple[int, int, int] | None = None  # (C, H, W); needed where the file leaves an axis open
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None  # of the channels; put in the graph
    std: Sequence[float] | None = None
    output_is_probs: bool = False  # the model ends in softmax
    resize: str = "refuse"


def import_members(
    store: Store, name: str, files: Sequence[Path], options: ImportOptions, activate: bool = True
) -> Version:
    """Publish foreign ONNX models, of any architectures, as one ensemble with equal weights.

    Raises:
        MemberError: a file cannot serve as a member, or the files do not agree on input shape and classes.
        StoreWriteError: the store cannot be written.
    """
    models = [_adapt(file, options) for file in files]
    shapes = {file.name: (shape, classes) for file, (_, shape, classes) in zip(files, models, strict=True)}
    if len(set(shapes.values())) > 1:
        listing = "; ".join(f"{file}: images {s}, {c} classes" for file, (s, c) in shapes.items())
        raise MemberError(f"The members of an ensemble take the same images and know the same classes. {listing}.")
    _, shape, classes = models[0]
    class_names = list(options.classes or map(str, range(classes)))
    if len(class_names) != classes:
        raise MemberError(f"{len(class_names)} class names were given, but the models tell {classes} classes apart.")
    with store.staging(name) as staged:
        (staged / "members").mkdir()
        members: list[Member] = []
        for index, (file, (model, _, _)) in enumerate(zip(files, models, strict=True)):
            path = f"members/{index:03d}.onnx"
            (staged / path).write_bytes(model)
            members.append(Member(file=path, origin=Origin(source=file.name), weight=1 / len(files)))
        draft = Draft(
            method="import",
            input=InputSpec.model_validate({"shape": shape, "resize": options.resize}),
            classes=class_names,
            members=members,
        )
        return store.publish(name, staged, draft, activate=activate)


def _adapt(file: Path, options: ImportOptions) -> tuple[bytes, tuple[int, int, int], int]:
    model = _load_with_weights(file)
    refuse_unknown_domains(model, file)
    model = _at_pinned_opset(model, file)
    graph = model.graph
    inputs, outputs = graph_inputs(graph), list(graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise MemberError(
            f"{file.name} has inputs {[v.name for v in inputs]} and outputs {[v.name for v in outputs]}; a member takes "
            "images and gives logits, nothing else. Export the classifier alone."
        )
    shape = _input_shape(file, inputs[0], options)
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["batch", *shape]))
    # Shapes that the exporter noted may name a fixed batch; they are inferred again when the session is made.
    del graph.value_info[:]
    front, body_input = _normalisation(options, shape[0])
    back, body_output = _logits_of_probs(options)
    # By way of names of our own: a model may call its input `logits`, or an inner value `images`.
    _rename(graph, inputs[0].name, "modepath_in")
    _rename(graph, outputs[0].name, "modepath_out")
    for name in (INPUT_NAME, OUTPUT_NAME):
        _rename(graph, name, f"modepath_inner_{name}")
    _rename(graph, "modepath_in", body_input)
    _rename(graph, "modepath_out", body_output)
    nodes = [*front[0], *graph.node, *back[0]]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*front[1], *back[1]])
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", None]))
    classes = _try(model, file, shape)
    graph.output[0].CopyFrom(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", classes]))
    return model.SerializeToString(), shape, classes


def _load_with_weights(file: Path) -> onnx.ModelProto:
    load(file)  # says what is wrong with a file that is no ONNX at all
    try:
        # Exporters like to put weights beside the graph; here, once, they are taken in. onnx refuses paths that leave the folder.
        return onnx.load(file, load_external_data=True)  # pyright: ignore[reportUnknownMemberType]
    except Exception as error:
        raise MemberError(
            f"{file.name} names weights in another file that cannot be read ({error}); put it beside."
        ) from None


def _at_pinned_opset(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if opset == ONNX_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, ONNX_OPSET)
    except Exception as error:
        raise MemberError(
            f"{file.name} uses ONNX opset {opset} and cannot be converted to {ONNX_OPSET} ({error}). Export it with opset {ONNX_OPSET}."
        ) from None


def _input_shape(file: Path, value: onnx.ValueInfoProto, options: ImportOptions) -> tuple[int, int, int]:
    found = dimensions(value)
    if value.type.tensor_type.elem_type != TensorProto.FLOAT or len(found) != 4:
        raise MemberError(
            f"{file.name} takes {value.name!r} with axes {found}; a member takes float32 images (batch, C, H, W)."
        )
    if found[0] is not None:
        raise MemberError(
            f"{file.name} has the fixed batch size {found[0]}; requests come in any size. Export with a dynamic first axis."
        )
    given = options.input_shape or (None, None, None)
    if any(f is not None and g is not None and f != g for f, g in zip(found[1:], given, strict=True)):
        raise MemberError(f"{file.name} takes images {found[1:]}, not {given}. Give the shape it was exported with.")
    channels, height, width = (f or g for f, g in zip(found[1:], given, strict=True))
    if channels is None or height is None or width is None:
        raise MemberError(f"{file.name} leaves the image size open {found[1:]}; say it with --input-shape C H W.")
    return channels, height, width


_Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


def _normalisation(options: ImportOptions, channels: int) -> tuple[_Part, str]:
    if options.mean is None and options.std is None:
        return ([], []), INPUT_NAME
    mean, std = options.mean or [0.0] * channels, options.std or [1.0] * channels
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise MemberError(
            f"mean and std need {channels} numbers, one a channel, the latter positive; got {mean} and {std}."
        )
    tensors = [
        numpy_helper.from_array(np.array(values, np.float32).reshape(1, -1, 1, 1), f"modepath_{label}")
        for label, values in (("mean", mean), ("std", std))
    ]
    nodes = [
        helper.make_node("Sub", [INPUT_NAME, "modepath_mean"], ["modepath_centred"]),
        helper.make_node("Div", ["modepath_centred", "modepath_std"], ["modepath_normalised"]),
    ]
    return (nodes, tensors), "modepath_normalised"


def _logits_of_probs(options: ImportOptions) -> tuple[_Part, str]:
    if not options.output_is_probs:
        return ([], []), OUTPUT_NAME
    # softmax(log p) = p; the floor keeps log finite.
    floor = numpy_helper.from_array(np.array(1e-30, np.float32), "modepath_floor")
    nodes = [
        helper.make_node("Max", ["modepath_probs", "modepath_floor"], ["modepath_positive"]),
        helper.make_node("Log", ["modepath_positive"], [OUTPUT_NAME]),
    ]
    return (nodes, [floor]), "modepath_probs"


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names_of in (node.input, node.output):
            for i, name in enumerate(names_of):
                if name == old:
                    names_of[i] = new
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, old, new)
    for tensor in graph.initializer:
        if tensor.name == old:
            tensor.name = new


def _try(model: onnx.ModelProto, file: Path, shape: tuple[int, int, int]) -> int:
    session = MemberSession(model.SerializeToString(), "cpu")
    images: NDArray[np.float32] = np.random.default_rng(0).random((3, *shape), dtype=np.float32)
    try:
        together = session.logits(images)
        alone = np.concatenate([session.logits(images[i : i + 1]) for i in range(3)])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise MemberError(f"{file.name} does not run on images {shape}: {error}") from None
    if together.ndim != 2 or together.shape[0] != 3 or together.shape[1] < 2:
        raise MemberError(
            f"{file.name} answers 3 images with an array {together.shape}; a member gives (batch, classes)."
        )
    if not np.isfinite(together).all():
        raise MemberError(
            f"{file.name} answers random images with NaN or infinity; its weights or its export are broken."
        )
    if np.abs(together - alone).max() > 1e-3 * max(1.0, float(np.abs(together).max())):
        raise MemberError(
            f"{file.name} answers an image differently in a batch and alone; it was exported in training mode. Export it in eval mode."
        )
    return together.shape[1]
