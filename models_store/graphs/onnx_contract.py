"""Requirements on the ONNX file of a member; FORMAT.md states them in prose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from models_store import file_kind
from models_store.errors import MemberError
from models_store.manifest import ONNX_OPSET, OUTPUT_NAME, InputSpec

# A protobuf message holds at most two gigabytes.
MAX_MODEL_BYTES = 2**31 - 1


def check_member(file: Path, spec: InputSpec, classes: int) -> None:
    """Check the ONNX file of a member against FORMAT.md.

    Raises:
        MemberError: the file is unreadable, has external data, an unknown domain or opset, or inputs and outputs other
            than the input of `spec`, (batch, *shape), and `logits` float32 (batch, classes).
    """
    model = load(file)
    refuse_external_data(model, file)
    _check_graph(model, file, spec, classes)


def check_template(file: Path, spec: InputSpec, classes: int, external: Mapping[str, tuple[int, ...]]) -> None:
    """Check a bank's template against FORMAT.md: a member, except that some initializers are supplied from memory.

    Args:
        file: the template.
        spec: the input.
        classes: number of classes.
        external: shape of each initializer that must be declared external; no other may be.

    Raises:
        MemberError: as for members, or other external initializers.
    """
    model = load(file)
    declared = {
        tensor.name: tuple(tensor.dims)
        for tensor in _all_tensors(model.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    if declared != dict(external):
        wrong = sorted(set(declared.items()) ^ set(external.items()))[0][0]
        raise MemberError(f"{file.name} and its weights file disagree about the initializer {wrong!r}. Publish again.")
    _check_graph(model, file, spec, classes)


def _check_graph(model: onnx.ModelProto, file: Path, spec: InputSpec, classes: int) -> None:
    refuse_unknown_domains(model, file)
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if opset != ONNX_OPSET:
        raise MemberError(
            f"{file.name} uses ONNX opset {opset}; members are opset {ONNX_OPSET}. Export it again with it."
        )
    kind = onnx.TensorProto.INT64 if spec.kind == "tokens" else onnx.TensorProto.FLOAT
    shape = (None, None) if spec.open_length else (None, *spec.shape)
    _check_value(file, "input", graph_inputs(model.graph), spec.tensor, shape, kind)
    _check_value(file, "output", list(model.graph.output), OUTPUT_NAME, (None, classes), onnx.TensorProto.FLOAT)


def load(file: Path) -> onnx.ModelProto:
    """Read a single-file ONNX model without following references to other files.

    Raises:
        MemberError: the file cannot be read, or is not ONNX.
    """
    try:
        model = onnx.load(file, load_external_data=False)  # pyright: ignore[reportUnknownMemberType]
    except OSError as error:
        raise MemberError(f"{file} cannot be read: {error.strerror}.") from None
    except Exception:  # protobuf raises several unrelated types
        model = onnx.ModelProto()
    # Protobuf parses an empty file, and some others, as a model with no field set.
    if not model.graph.output:
        raise MemberError(f"{file} {_not_onnx(file)}. Give a file written by an ONNX exporter.")
    return model


def _not_onnx(file: Path) -> str:
    kind = file_kind.kind(file)
    if kind == "unknown":
        return "cannot be read as ONNX: it is damaged, or something else"
    if kind in ("torch", "safetensors"):
        return f"{file_kind.said(file)}. It is not an ONNX model; pass weights to training with --init"
    return f"{file_kind.said(file)}; it is not an ONNX model"


def refuse_external_data(model: onnx.ModelProto, file: Path) -> None:
    """Refuse weights in another file: that file could be replaced after the member's hash was computed.

    Raises:
        MemberError: some tensor is external.
    """
    for tensor in _all_tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise MemberError(
                f"{file.name} keeps the weights of {tensor.name!r} in another file; a member is one file. "
                "Save it with its weights inside."
            )


def refuse_unknown_domains(model: onnx.ModelProto, file: Path) -> None:
    """Refuse operators that ONNX does not define: only its own ones run everywhere and are known to be pure arithmetic.

    Raises:
        MemberError: some operator comes from another domain.
    """
    known = ("", "ai.onnx", "ai.onnx.ml")  # the last one: trees, linear models and encoders
    domains = {entry.domain for entry in model.opset_import} | domains_in_use(model)
    local = {function.domain for function in model.functions}
    if unknown := sorted(domains - set(known) - local):
        raise MemberError(
            f"{file.name} uses operators of {', '.join(map(repr, unknown))}; members use standard ONNX operators only. "
            "Export without custom or contrib operators."
        )


def domains_in_use(model: onnx.ModelProto) -> set[str]:
    """Domains of the operators in the graph and in the model's functions."""
    nodes = [*_all_nodes(model.graph), *(node for function in model.functions for node in function.node)]
    return {node.domain for node in nodes}


def graph_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Inputs of a graph without its initializers, which old exporters list among the inputs."""
    initializers = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in initializers]


def dimensions(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Lengths of a value's axes; None for an open axis (for which some exporters write -1 or 0)."""
    return tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim
    )


def _check_value(
    file: Path, kind: str, values: list[onnx.ValueInfoProto], name: str, wanted: tuple[int | None, ...], element: int
) -> None:
    if [value.name for value in values] != [name]:
        raise MemberError(f"{file.name} has {kind}s {[v.name for v in values]}; a member has one, named {name!r}.")
    found = dimensions(values[0])
    if values[0].type.tensor_type.elem_type != element or len(found) != len(wanted):
        asked, own = map(_type_name, (element, values[0].type.tensor_type.elem_type))
        raise MemberError(
            f"{file.name}: {kind} {name!r} must be {asked} {_shape(wanted)}; it is {own} {_shape(found)}."
        )
    if found[0] is not None:
        raise MemberError(
            f"{file.name}: {kind} {name!r} has the fixed batch size {found[0]}; requests come in any size. "
            "Export with a dynamic first axis."
        )
    # An open axis of the output is allowed: shape inference cannot always determine its length.
    if any(f is not None and f != w for f, w in zip(found[1:], wanted[1:], strict=True)):
        raise MemberError(f"{file.name}: {kind} {name!r} must be {_shape(wanted)}; it is {_shape(found)}.")


def _type_name(element: int) -> str:
    known = element in onnx.TensorProto.DataType.values()
    return onnx.TensorProto.DataType.Name(element) if known else f"of the unknown type {element}"


def _shape(axes: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if i == 0 and a is None else str(a or "?") for i, a in enumerate(axes)) + ")"


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                nodes += _all_nodes(inner)
    return nodes


def _all_tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                tensors += _all_tensors(inner)
    return tensors
