"""Adapt the graph of a foreign ONNX classifier to FORMAT.md, by operators that are added before and after it.

What the file states is used: names, types, axes, the last operator. What it cannot state (are bytes 0 to 255? do
channels come last?) are options. The adapted graph is compared with the original, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models_store.errors import MemberError
from models_store.graphs import independence, named_inputs, output_kind
from models_store.graphs.onnx_contract import dimensions, domains_in_use, graph_inputs, load, refuse_unknown_domains
from models_store.graphs.runtime import MemberSession, Original
from models_store.graphs.steps import Steps
from models_store.inputs import kinds
from models_store.inputs.texts import Tokenizer
from models_store.manifest import ONNX_OPSET, OUTPUT_NAME, InputSpec

# Further inputs of text classifiers, and what they are computed from: the mask of the token ids, or zeros.
_BESIDE_TOKENS = {"attention_mask": "mask", "input_mask": "mask", "token_type_ids": "zeros", "segment_ids": "zeros"}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
_INTEGERS = {TensorProto.INT64, TensorProto.INT32}
_TOLERANCE = 1e-5  # of the adapted outputs, relative to the largest original one
_HALF_TOLERANCE = 2e-2  # of models in half precision, whose rounding depends on the batch size
_EXTREMES = 3  # probes at the end that are extreme, and may give infinity


@dataclass(frozen=True)
class ImportOptions:
    """Properties of a foreign model that its file does not contain."""

    input_shape: tuple[int, ...] | None = None  # of one row; required if the file leaves an axis open
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None  # one value per channel or feature; added to the graph, like std
    std: Sequence[float] | None = None
    output: Literal["logits", "probs"] = "logits"
    resize: str = "refuse"
    kind: Literal["image", "features", "tokens"] | None = None  # None: by the type and the axes of the input
    vocabulary: int | None = None  # tokens: number of ids
    tokenizer: bytes | None = None  # tokens: content of a tokenizer.json, which is published with the members
    channels_last: bool = False  # images (H, W, C) instead of (C, H, W)
    pixels: Literal[1, 255] = 1  # largest value of a pixel
    output_name: str | None = None  # which output gives the classes, if there are several

    @property
    def as_they_are(self) -> bool:
        """Whether no option says what inputs are or converts them."""
        given = self.mean, self.std, self.input_shape, self.kind, self.vocabulary, self.tokenizer
        return all(one is None for one in given) and self.pixels == 1 and not self.channels_last


@dataclass(frozen=True)
class Adapted:
    """A model that follows FORMAT.md."""

    model: bytes
    spec: InputSpec
    classes: int
    kind: output_kind.Kind  # of the original model's output


def adapt(file: Path, options: ImportOptions) -> Adapted:
    """Adapt a foreign classifier.

    Raises:
        MemberError: it cannot be adapted, does not run, gives NaN, or mixes the rows of a batch; the message says why.
    """
    model = _load_with_weights(file)
    _forget_unused_domains(model)
    refuse_unknown_domains(model, file)
    original = model.SerializeToString()
    model = _at_pinned_opset(model, file)
    graph = model.graph
    _unwrap_zipmap(graph)
    inputs = graph_inputs(graph)
    output = _output(file, graph, options)
    given = _given(file, inputs)
    spec = (
        _spec(file, given, options)
        if given is not None
        else named_inputs.spec_of(file, inputs, as_they_are=options.as_they_are)
    )
    last = output_kind.last_operator(model, output.name)
    batch = dimensions(given or inputs[0])[0]
    if batch is not None:
        _open_batch(graph, batch)
    # Shapes recorded by the exporter may contain a fixed batch size; they are inferred again when a session is created.
    del graph.value_info[:]
    _surround(graph, spec, inputs, given, output, options)
    answers = _try(model, file, spec, batch)
    classes = answers.shape[1]
    graph.output[0].CopyFrom(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", classes]))
    own = np.exp(answers) if options.output == "probs" else answers
    adapted, kind = model.SerializeToString(), output_kind.kind(own, last)
    if (kind == "probs") == (options.output == "probs"):  # otherwise the caller says what is wrong
        _compare(file, original, output.name, adapted, spec, given, inputs, options)
    return Adapted(adapted, spec, classes, kind)


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
    # Exporters list operator sets that the graph does not use.
    used = domains_in_use(model)
    kept = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx") or entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _at_pinned_opset(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if opset == ONNX_OPSET:
        return model
    if domains_in_use(model) == {"ai.onnx.ml"}:  # nothing to convert
        kept = [entry for entry in model.opset_import if entry.domain]
        del model.opset_import[:]
        model.opset_import.extend([*kept, helper.make_opsetid("", ONNX_OPSET)])
        return model
    try:
        return onnx.version_converter.convert_version(model, ONNX_OPSET)
    except Exception as error:
        raise MemberError(
            f"{file.name} uses ONNX opset {opset} and cannot be converted to {ONNX_OPSET} ({error}). "
            f"Export it with opset {ONNX_OPSET}."
        ) from None


def _unwrap_zipmap(graph: onnx.GraphProto) -> None:
    """Replace scikit-learn's list of dictionaries by the array that it is made of."""
    for node in [node for node in graph.node if node.op_type == "ZipMap"]:
        graph.node.remove(node)
        for output in graph.output:
            if output.name == node.output[0]:
                output.CopyFrom(helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, ["batch", None]))


def _output(file: Path, graph: onnx.GraphProto, options: ImportOptions) -> onnx.ValueInfoProto:
    outputs = list(graph.output)
    if options.output_name is not None:
        chosen = [value for value in outputs if value.name == options.output_name]
        if not chosen:
            raise MemberError(
                f"{file.name} has no output {options.output_name!r}; its outputs are {', '.join(v.name for v in outputs)}."
            )
        return chosen[0]
    # scikit-learn also gives the label, which is computed from the scores.
    scores = [value for value in outputs if value.type.tensor_type.elem_type in _FLOATS]
    if len(scores) != 1:
        listed = ", ".join(f"{value.name} {dimensions(value)}" for value in outputs)
        raise MemberError(
            f"{file.name} has the outputs {listed}. Name the one that gives a number for each class with --output-name."
        )
    return scores[0]


def _given(file: Path, inputs: Sequence[onnx.ValueInfoProto]) -> onnx.ValueInfoProto | None:
    """The input that is classified, of which the others can be made; None if there are several, which become named fields."""
    own = [value for value in inputs if value.name not in _BESIDE_TOKENS]
    if len(own) == 1 and (len(inputs) == 1 or own[0].type.tensor_type.elem_type in _INTEGERS):
        return own[0]
    if not own:
        raise MemberError(
            f"{file.name} has the inputs {', '.join(v.name for v in inputs)}, none of which is classified."
        )
    return None


def _spec(file: Path, value: onnx.ValueInfoProto, options: ImportOptions) -> InputSpec:
    element, found = value.type.tensor_type.elem_type, dimensions(value)
    if element == TensorProto.UINT8 and len(found) == 4:
        kind = "image"
    elif options.kind == "features" and element in named_inputs.NUMBERS and len(found) >= 2:
        kind = "features"
    elif element in _INTEGERS and len(found) == 2:
        kind = "tokens"
    elif element in _FLOATS and len(found) >= 2:
        kind = options.kind or ("image" if len(found) == 4 else "features")
    else:
        name = TensorProto.DataType.Name(element)
        raise MemberError(
            f"{file.name} takes {value.name!r} of {name} with axes {found}; a member takes float or byte images (batch, C, H, W), float "
            "features (batch, …), or token ids (batch, length) as integers."
        )
    if options.kind not in (None, kind) or (kind == "image" and len(found) != 4):
        raise MemberError(
            f"{file.name} takes {value.name!r} with axes {found}, which cannot be {options.kind or kind}; leave out --kind."
        )
    if kind == "tokens":
        vocabulary = options.vocabulary or (Tokenizer(options.tokenizer).vocabulary if options.tokenizer else None)
        if vocabulary is None:
            raise MemberError(
                f"{file.name} takes token ids; say how many ids there are with --vocabulary NUMBER, or give --tokenizer FILE."
            )
        if (longest := found[1] or (options.input_shape or (None,))[0]) is None:
            raise MemberError(f"{file.name} takes texts of any length; give the largest one with --input-shape LENGTH.")
        return InputSpec(
            kind="tokens",
            shape=(longest,),
            vocabulary=vocabulary,
            open_length=found[1] is None,
            tokenizer=options.tokenizer is not None,
        )
    shape = _image_shape(file, found, options) if kind == "image" else _features_shape(file, found, options)
    return InputSpec.model_validate(
        {"kind": kind, "shape": shape, "resize": options.resize if kind == "image" else "refuse"}
    )


def _features_shape(file: Path, found: tuple[int | None, ...], options: ImportOptions) -> tuple[int, ...]:
    given = options.input_shape or (None,) * (len(found) - 1)
    if len(given) != len(found) - 1 or any(f and g and f != g for f, g in zip(found[1:], given, strict=True)):
        raise MemberError(f"{file.name} takes features {found[1:]}, not {given}. Give the shape it was exported with.")
    shape = tuple(f or g for f, g in zip(found[1:], given, strict=True))
    if None in shape:
        raise MemberError(f"{file.name} leaves the number of features open {found[1:]}; give it with --input-shape.")
    return tuple(int(axis) for axis in shape if axis)


def _image_shape(file: Path, found: tuple[int | None, ...], options: ImportOptions) -> tuple[int, ...]:
    axes = (found[3], found[1], found[2]) if options.channels_last else found[1:]
    if options.input_shape is not None and len(options.input_shape) != 3:
        raise MemberError(f"{file.name} takes images; --input-shape needs three numbers, C H W.")
    given = options.input_shape or (None, None, None)
    contradicted = any(f is not None and g is not None and f != g for f, g in zip(axes, given, strict=True))
    if not options.channels_last and _channels_come_last(axes) and (contradicted or options.input_shape is None):
        raise MemberError(
            f"{file.name} takes images {axes}, apparently with the channels in the last axis: import it with --channels-last. If the first "
            "of these numbers is the number of channels after all, as in (C, H, W), confirm it with --input-shape C H W."
        )
    if contradicted:
        raise MemberError(f"{file.name} takes images {axes}, not {given}. Give the shape it was exported with.")
    shape = tuple(f or g for f, g in zip(axes, given, strict=True))
    if None in shape:
        raise MemberError(f"{file.name} leaves the image size open {axes}; give it with --input-shape C H W.")
    return tuple(int(axis) for axis in shape if axis)


def _channels_come_last(shape: tuple[int | None, ...]) -> bool:
    """True if the shape looks like (H, W, C): a short last axis, and a first axis that is open or longer than 4."""
    return shape[2] in (1, 3, 4) and (shape[0] is None or shape[0] > 4)


def _open_batch(graph: onnx.GraphProto, batch: int) -> None:
    """Let a model of a fixed batch size take any: reshapes to it keep the axis that they find (0 in ONNX)."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {
        n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].HasField("t")
    }
    for node in graph.node:
        if node.op_type != "Reshape" or (target := tensors.get(node.input[1])) is None:
            continue
        sizes = numpy_helper.to_array(target).copy()
        if len(sizes) and sizes[0] == batch:
            sizes[0] = 0
            tensor = numpy_helper.from_array(sizes, f"{node.input[1]}.{node.output[0]}.any_batch")
            graph.initializer.append(tensor)
            node.input[1] = tensor.name


def _surround(
    graph: onnx.GraphProto,
    spec: InputSpec,
    inputs: Sequence[onnx.ValueInfoProto],
    given: onnx.ValueInfoProto | None,
    output: onnx.ValueInfoProto,
    options: ImportOptions,
) -> None:
    """Put operators before and after the graph, so that it takes and gives what FORMAT.md says."""
    # Rename via unique names, because a model may call its input `logits`, or an inner value `images`.
    own = {value.name: f"modepath_in_{number}" for number, value in enumerate(inputs)}
    for name, new in own.items():
        _rename(graph, name, new)
    _rename(graph, output.name, "modepath_out")
    for name in (spec.tensor, OUTPUT_NAME):
        _rename(graph, name, f"modepath_inner_{name}")
    front = Steps("front", spec.tensor) if given is not None else named_inputs.unpacked(spec, inputs, own)
    if given is not None:
        _convert(front, spec, given, options)
        front.end(own[given.name])
    for value in inputs if given is not None else ():
        if value.name in _BESIDE_TOKENS:
            beside = Steps(own[value.name], spec.tensor)
            if _BESIDE_TOKENS[value.name] == "mask":
                beside.add("Greater", np.int64(0))
                beside.add("Cast", to=value.type.tensor_type.elem_type)
            else:
                beside.add("Mul", np.int64(0))
                beside.add("Cast", to=value.type.tensor_type.elem_type)
            beside.end(own[value.name])
            front.nodes += beside.nodes
            front.tensors += beside.tensors
    back = Steps("back", "modepath_out")
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        back.add("Cast", to=TensorProto.FLOAT)
    if len(dimensions(output)) > 2:  # (batch, classes, 1, 1)
        back.add("Flatten", axis=1)
    if options.output == "probs":
        # softmax(log p) = p; the floor keeps log finite.
        back.add("Max", np.float32(1e-30))
        back.add("Log")
    back.end(OUTPUT_NAME)
    nodes = [*front.nodes, *graph.node, *back.nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*front.tensors, *back.tensors])
    del graph.input[:], graph.output[:]
    shape = ["batch", "length"] if spec.open_length else ["batch", *spec.shape]
    kind = TensorProto.INT64 if spec.kind == "tokens" else TensorProto.FLOAT
    graph.input.append(helper.make_tensor_value_info(spec.tensor, kind, shape))
    graph.output.append(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", None]))


def _convert(front: Steps, spec: InputSpec, given: onnx.ValueInfoProto, options: ImportOptions) -> None:
    if options.mean is not None or options.std is not None:
        _normalise(front, spec, options)
    element = given.type.tensor_type.elem_type
    if options.pixels == 255 or (element == TensorProto.UINT8 and spec.kind == "image"):
        front.add("Mul", np.float32(255))
    if options.channels_last:
        front.add("Transpose", perm=[0, 2, 3, 1])
    if element == TensorProto.UINT8 and spec.kind == "image":
        front.add("Round")
    if element != (TensorProto.INT64 if spec.kind == "tokens" else TensorProto.FLOAT):
        front.add("Cast", to=element)


def _normalise(front: Steps, spec: InputSpec, options: ImportOptions) -> None:
    count = spec.shape[0]
    mean, std = options.mean or [0.0] * count, options.std or [1.0] * count
    if spec.kind == "tokens" or len(mean) != count or len(std) != count or min(std) <= 0:
        what = "channel" if spec.kind == "image" else "feature"
        raise MemberError(
            f"mean and std need {count} numbers, one per {what}, and std must be positive; got {mean} and {std}."
        )
    axes = (1, -1, *([1] * (len(spec.shape) - 1)))
    front.add("Sub", np.array(mean, np.float32).reshape(axes))
    front.add("Div", np.array(std, np.float32).reshape(axes))


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


def _try(model: onnx.ModelProto, file: Path, spec: InputSpec, batch: int | None) -> NDArray[np.float32]:
    """Run the model on several different rows; returns its outputs, (batch, classes).

    Raises:
        MemberError: the model does not run, returns another shape or NaN, or mixes the rows of a batch.
    """
    session = MemberSession(model.SerializeToString(), "cpu")
    rows = kinds.probes(spec)
    noun = kinds.NOUNS[spec.kind]
    if (fault := independence.fault(session.logits, rows, spec)) is not None:
        if batch is not None:
            raise MemberError(
                f"{file.name} has the fixed batch size {batch}, and it cannot be opened: with another size it {fault}. "
                "Export it with a dynamic first axis."
            )
        raise MemberError(
            f"{file.name} {fault}. A member gives (batch, classes) for a batch of any size, and its answer for one {noun} "
            "does not depend on the others: export the classifier in eval mode with a dynamic first axis, "
            "and without layers that compute over the batch."
        )
    answers = session.logits(rows)
    if answers.shape[1] < 2:
        raise MemberError(
            f"{file.name} gives {answers.shape[1]} number for one {noun}; a classifier gives one for each class."
        )
    if not np.isfinite(answers[:-_EXTREMES]).all():
        raise MemberError(
            f"{file.name} returns NaN or infinity for random {noun}s; its weights or its export are broken."
        )
    return answers


def _compare(
    file: Path,
    original: bytes,
    output: str,
    adapted: bytes,
    spec: InputSpec,
    given: onnx.ValueInfoProto | None,
    inputs: Sequence[onnx.ValueInfoProto],
    options: ImportOptions,
) -> None:
    """Compare the adapted model with the original one on rows alone, which a fixed batch size of 1 allows.

    Raises:
        MemberError: they differ.
    """
    batch = dimensions(given or inputs[0])[0]
    if batch not in (None, 1):
        return  # the original takes no single row; the rows of the adapted one were compared with each other
    mine, theirs = MemberSession(adapted, "cpu"), Original(original, "cpu")
    element = (given or inputs[0]).type.tensor_type.elem_type
    half = any(v.type.tensor_type.elem_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for v in inputs)
    for number in range(len(rows := kinds.probes(spec))):
        row = rows[number : number + 1]
        found = mine.logits(row)
        asked = row
        if options.mean is not None or options.std is not None:
            axes = (1, -1, *([1] * (len(spec.shape) - 1)))
            mean, std = options.mean or [0.0] * spec.shape[0], options.std or [1.0] * spec.shape[0]
            asked = (asked - np.array(mean, np.float32).reshape(axes)) / np.array(std, np.float32).reshape(axes)
        bytes_of_pixels = element == TensorProto.UINT8 and spec.kind == "image"
        if options.pixels == 255 or bytes_of_pixels:
            asked = asked * np.float32(255)
        if options.channels_last:
            asked = asked.transpose(0, 2, 3, 1)
        asked = np.rint(asked) if bytes_of_pixels else asked
        beside = {"mask": (row > 0).astype(np.int64), "zeros": np.zeros_like(row)} if spec.kind == "tokens" else {}
        values = {name: beside[_BESIDE_TOKENS[name]] for name in theirs.inputs if name in _BESIDE_TOKENS}
        if given is not None:
            values[given.name] = asked
        else:
            values = named_inputs.cut(spec, inputs, row)
        expected = theirs.run(output, values).reshape(found.shape)
        found = np.exp(found) if options.output == "probs" else found
        limit = (_HALF_TOLERANCE if half else _TOLERANCE) * max(1.0, float(np.nan_to_num(np.abs(expected)).max()))
        if (np.abs(np.nan_to_num(found) - np.nan_to_num(expected)) > limit).any():
            raise MemberError(
                f"{file.name} gives other outputs after it was adapted (by up to {np.abs(found - expected).max():.2g}). "
                f"Export it with opset {ONNX_OPSET}, in float32 and with a dynamic first axis."
            )
