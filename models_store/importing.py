"""Import ONNX files from other tools as members.

A foreign model is adapted to FORMAT.md: names of input and output, opset, weights inside the file. Normalisation, and a
log for models that end in softmax, are added to the graph. A model that cannot be adapted is refused with the reason.
The model is then run. Its outputs show whether it returns logits or probabilities, and whether it computes the output
for an image independently of the other images in the batch.
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
from models_store.graphs import independence, output_kind
from models_store.graphs.onnx_contract import dimensions, domains_in_use, graph_inputs, load, refuse_unknown_domains
from models_store.graphs.runtime import MemberSession
from models_store.manifest import INPUT_NAME, ONNX_OPSET, OUTPUT_NAME, Draft, InputSpec, Member, Origin
from models_store.store import Store, Version


@dataclass(frozen=True)
class ImportOptions:
    """Properties of a foreign model that its file does not contain."""

    input_shape: tuple[int, int, int] | None = None  # (C, H, W); required if the file leaves an axis open
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None  # one value per channel; added to the graph, like std
    std: Sequence[float] | None = None
    output_is_probs: bool = False  # the model ends in softmax
    resize: str = "refuse"


def import_members(
    store: Store, name: str, files: Sequence[Path], options: ImportOptions, activate: bool = True
) -> Version:
    """Publish foreign ONNX models, whose architectures may differ, as one ensemble with equal weights.

    Raises:
        MemberError: a file cannot serve as a member, or the files do not agree on input shape and classes.
        StoreWriteError: the store cannot be written.
    """
    models = [_adapt(file, options) for file in files]
    shapes = {(one.shape, one.classes) for one in models}
    if len(shapes) > 1:
        listing = "; ".join(
            f"{file.name}: images {one.shape}, {one.classes} classes" for file, one in zip(files, models, strict=True)
        )
        raise MemberError(f"The members of an ensemble take the same images and know the same classes. {listing}.")
    _check_kinds(files, models, options)
    ((shape, classes),) = shapes
    class_names = list(options.classes or map(str, range(classes)))
    if len(class_names) != classes:
        raise MemberError(f"{len(class_names)} class names were given, but the models have {classes} classes.")
    with store.staging(name) as staged:
        (staged / "members").mkdir()
        members: list[Member] = []
        for index, (file, one) in enumerate(zip(files, models, strict=True)):
            path = f"members/{index:03d}.onnx"
            (staged / path).write_bytes(one.model)
            members.append(Member(file=path, origin=Origin(source=file.name), weight=1 / len(files)))
        draft = Draft(
            method="import",
            input=InputSpec.model_validate({"shape": shape, "resize": options.resize}),
            classes=class_names,
            members=members,
        )
        return store.publish(name, staged, draft, activate=activate)


@dataclass(frozen=True)
class _Adapted:
    model: bytes
    shape: tuple[int, int, int]
    classes: int
    kind: output_kind.Kind  # of the original model's output, before anything was added


def _check_kinds(files: Sequence[Path], models: Sequence[_Adapted], options: ImportOptions) -> None:
    """Check that all models return the kind of output that --output states.

    Raises:
        MemberError: a model returns another kind, or the models differ.
    """
    named = {kind: [f.name for f, one in zip(files, models, strict=True) if one.kind == kind] for kind in _GIVES}
    if sigmoid := named["sigmoid"]:
        raise MemberError(
            f"{', '.join(sigmoid)} ends in a sigmoid: scores of independent labels, which are neither logits nor the "
            "probabilities of one class out of several. Export the classifier without its last sigmoid."
        )
    if named["probs"] and named["logits"]:
        raise MemberError(
            f"{', '.join(named['logits'])} gives logits, but {', '.join(named['probs'])} gives probabilities (its rows "
            "sum to 1: it ends in softmax). The members of one ensemble must give the same: export all of them without "
            "softmax."
        )
    if named["probs"] and not options.output_is_probs:
        raise MemberError(
            f"{', '.join(named['probs'])} gives probabilities, not logits: its rows lie in [0, 1] and sum to 1, so it "
            "ends in softmax. Import it with --output probs."
        )
    if named["logits"] and options.output_is_probs:
        raise MemberError(
            f"{', '.join(named['logits'])} does not give probabilities: its rows do not lie in [0, 1] and sum to 1. "
            "If it gives logits, leave out --output probs."
        )


_GIVES: tuple[output_kind.Kind, ...] = ("logits", "probs", "sigmoid")


def _adapt(file: Path, options: ImportOptions) -> _Adapted:
    model = _load_with_weights(file)
    _forget_unused_domains(model)
    refuse_unknown_domains(model, file)
    model = _at_pinned_opset(model, file)
    graph = model.graph
    inputs, outputs = graph_inputs(graph), list(graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise MemberError(
            f"{file.name} has inputs {[v.name for v in inputs]} and outputs {[v.name for v in outputs]}; a member "
            "takes images and gives logits, nothing else. Export the classifier alone."
        )
    shape = _input_shape(file, inputs[0], options)
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["batch", *shape]))
    # Shapes recorded by the exporter may contain a fixed batch size; they are inferred again when a session is created.
    del graph.value_info[:]
    last = output_kind.last_operator(model)
    front, body_input = _normalisation(options, shape[0])
    back, body_output = _logits_of_probs(options)
    # Rename via unique names, because a model may call its input `logits`, or an inner value `images`.
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
    answers = _try(model, file, shape)
    classes = answers.shape[1]
    graph.output[0].CopyFrom(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", classes]))
    own = np.exp(answers) if options.output_is_probs else answers
    return _Adapted(model.SerializeToString(), shape, classes, output_kind.kind(own, last))


def _load_with_weights(file: Path) -> onnx.ModelProto:
    load(file)  # raises an error with the reason if the file is not ONNX
    try:
        # Many exporters put the weights into a file next to the graph. They are merged into the model here, and only
        # here. onnx refuses paths that leave the folder.
        return onnx.load(file, load_external_data=True)  # pyright: ignore[reportUnknownMemberType]
    except Exception as error:
        raise MemberError(
            f"{file.name} names weights in another file that cannot be read ({error}); put that file next to it."
        ) from None


def _forget_unused_domains(model: onnx.ModelProto) -> None:
    # Exporters of classical models list ai.onnx.ml even if the graph does not use it.
    used = domains_in_use(model)
    kept = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx") or entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _at_pinned_opset(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if opset == ONNX_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, ONNX_OPSET)
    except Exception as error:
        raise MemberError(
            f"{file.name} uses ONNX opset {opset} and cannot be converted to {ONNX_OPSET} ({error}). "
            f"Export it with opset {ONNX_OPSET}."
        ) from None


def _input_shape(file: Path, value: onnx.ValueInfoProto, options: ImportOptions) -> tuple[int, int, int]:
    found = dimensions(value)
    if value.type.tensor_type.elem_type != TensorProto.FLOAT or len(found) != 4:
        raise MemberError(
            f"{file.name} takes {value.name!r} with axes {found}; a member takes float32 images (batch, C, H, W)."
        )
    if found[0] is not None:
        raise MemberError(
            f"{file.name} has the fixed batch size {found[0]}; requests come in any size. "
            "Export with a dynamic first axis."
        )
    given = options.input_shape or (None, None, None)
    contradicted = any(f is not None and g is not None and f != g for f, g in zip(found[1:], given, strict=True))
    if _channels_come_last(found[1:]) and (contradicted or options.input_shape is None):
        raise MemberError(
            f"{file.name} takes images {found[1:]}, apparently with the channels in the last axis; a member takes "
            "(C, H, W). Export it with channels first, or with a transpose of axes (0, 2, 3, 1) as its first operator. "
            "If the first of these numbers is the number of channels after all, confirm it with --input-shape C H W."
        )
    if contradicted:
        raise MemberError(f"{file.name} takes images {found[1:]}, not {given}. Give the shape it was exported with.")
    channels, height, width = (f or g for f, g in zip(found[1:], given, strict=True))
    if channels is None or height is None or width is None:
        raise MemberError(f"{file.name} leaves the image size open {found[1:]}; give it with --input-shape C H W.")
    return channels, height, width


def _channels_come_last(shape: tuple[int | None, ...]) -> bool:
    """True if the shape looks like (H, W, C): a short last axis, and a first axis that is open or longer than 4."""
    return shape[2] in (1, 3, 4) and (shape[0] is None or shape[0] > 4)


_NOISE = 3  # number of plain noise images among those that `probes` returns without given images
_Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


def _normalisation(options: ImportOptions, channels: int) -> tuple[_Part, str]:
    if options.mean is None and options.std is None:
        return ([], []), INPUT_NAME
    mean, std = options.mean or [0.0] * channels, options.std or [1.0] * channels
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise MemberError(
            f"mean and std need {channels} numbers, one per channel, and std must be positive; got {mean} and {std}."
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


def _try(model: onnx.ModelProto, file: Path, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Run the model on several different images; returns its outputs, (batch, classes).

    Raises:
        MemberError: the model does not run, returns another shape or NaN, or mixes the images of a batch.
    """
    session = MemberSession(model.SerializeToString(), "cpu")
    images = independence.probes(shape)
    if (fault := independence.fault(session.logits, images)) is not None:
        raise MemberError(
            f"{file.name} {fault}. A member gives (batch, classes) for a batch of any size, and its answer for an "
            "image does not depend on the other images: export the classifier in eval mode with a dynamic first axis, "
            "and without layers that compute over the batch."
        )
    answers = session.logits(images)
    if answers.shape[1] < 2:
        raise MemberError(
            f"{file.name} gives {answers.shape[1]} number for an image; a classifier gives one for each class."
        )
    if not np.isfinite(answers[:_NOISE]).all():
        raise MemberError(
            f"{file.name} returns NaN or infinity for random images; its weights or its export are broken."
        )
    return answers
