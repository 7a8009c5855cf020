"""Several members in one graph: what one thread runs is then one call.

A call costs Python's lock twice, and the thread that answers HTTP holds it often: merged, twelve small networks answered a
tenth more requests. Their arithmetic stays what it was, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx.compose

# Merged, weights are copied once more while they are loaded; and for large networks a call more or less is nothing.
MERGED_BYTES = 64 * 2**20


def load_to_merge(models: Sequence[Path]) -> list[onnx.ModelProto] | None:
    """The models, where they are small together and plain enough to be joined; else None."""
    if sum(model.stat().st_size for model in models) > MERGED_BYTES:
        return None
    loaded = [onnx.load_from_string(model.read_bytes()) for model in models]
    return loaded if all(map(_plain, loaded)) else None


def merged(models: Sequence[onnx.ModelProto]) -> bytes:
    """One model with the members' one input, and an output for each member, in their order.

    Args:
        models: plain members as FORMAT.md has them, of the same input and opset.
    """
    parts = [onnx.compose.add_prefix(model, f"{i}.", rename_inputs=False) for i, model in enumerate(models)]
    graph = onnx.helper.make_graph(
        nodes=[node for part in parts for node in part.graph.node],
        name="members",
        inputs=parts[0].graph.input,
        outputs=[output for part in parts for output in part.graph.output],
        initializer=[tensor for part in parts for tensor in part.graph.initializer],
    )
    return onnx.helper.make_model(
        graph, opset_imports=parts[0].opset_import, ir_version=max(part.ir_version for part in parts)
    ).SerializeToString()


def _plain(model: onnx.ModelProto) -> bool:
    # onnx's renaming loses track of branches and loops, and functions and sparse weights would be left behind.
    branches = any(attribute.HasField("g") or attribute.graphs for n in model.graph.node for attribute in n.attribute)
    return not (branches or model.functions or model.graph.sparse_initializer)
