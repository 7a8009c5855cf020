"""From a torch network to an ONNX member that gives the same answers."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from models_store.errors import MemberError
from models_store.graphs import independence
from models_store.graphs.runtime import MemberSession, in_batches
from models_store.inputs import kinds
from models_store.manifest import ONNX_OPSET, OUTPUT_NAME, InputSpec
from models_store.uncertainty import softmax
from training import logger
from training.data import Data
from training.errors import ExportError
from training.networks import layout
from training.networks.normaliser import Normaliser

LOGITS_TOLERANCE = 1e-4  # times max(1, max |logit|)
# For probabilities: absolute up to logits of 10, and in proportion to the logits beyond. A logit is rounded relative to
# its size, by about 1e-6 of it after some layers, and a probability changes by up to half as much as a logit.
PROBS_TOLERANCE = 1e-5
_EXACT_LOGITS = 10.0
_LAST_BITS = 10.0  # times the effect of the last bit of the pixels, if a network amplifies it
_LOOSEST = 1e-3  # upper limit for networks that amplify rounding
# At such logits softmax has long been one-hot in float32. Only a diverged training, or one without any scaling, reaches
# them.
DIVERGED_LOGITS = 1e3


class Normalised(nn.Module):
    """The exported network: images in [0, 1], or other inputs, to logits. It includes normalisation, as in training."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        """Create one for images; `of` creates one for the inputs of a data set."""
        super().__init__()
        self.network = network
        self.normaliser = Normaliser(mean, std, 3)

    @classmethod
    def of(cls, network: nn.Module, data: Data) -> Normalised:
        """The exported network for the inputs of a data set."""
        made = cls(network, (), ())
        made.normaliser = Normaliser.of(data)
        return made

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, *shape) -> (batch, classes)."""
        return self.network(self.normaliser(inputs))


def to_onnx(network: Normalised, spec: InputSpec) -> bytes:
    """A single-file ONNX model with an open batch axis.

    Raises:
        ExportError: torch cannot export this network.
    """
    return _fold(to_template(network, spec))


def to_template(network: Normalised, spec: InputSpec) -> onnx.ModelProto:
    """The traced graph, in which every weight is an initializer under its torch name.

    Texts have an open length if the spec says so.

    Raises:
        ExportError: torch cannot export this network.
    """
    network = copy.deepcopy(network).cpu().float().eval()
    # Contiguous weights: the exporter writes them as they are, and other layouts are for training only.
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.contiguous()
    try:
        with _quiet():
            program = torch.onnx.export(
                _trace(network, spec),
                dynamo=True,
                opset_version=ONNX_OPSET,
                input_names=[spec.tensor],
                output_names=[OUTPUT_NAME],
                verbose=False,
                optimize=False,  # folding would lose the names of weights
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot export this network: {_reason(error)}. Its forward must be traceable by torch.export with an open batch "
            "axis: no Python branches on values, no loops over the batch, no .item(), no fixed batch size; and ONNX must have its operators. "
            "Nothing was published."
        ) from error
    assert program is not None
    return program.model_proto


def _reason(error: BaseException) -> str:
    """What failed, without terminal codes: the operator if it is known, else the innermost message's first line."""
    innermost, texts = error, []
    while True:
        texts.append(str(innermost))
        if (cause := innermost.__cause__ or innermost.__context__) is None:
            break
        innermost = cause
    everything = "\n".join(texts)
    if operator := re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", everything):
        return f"ONNX has no operator for {operator[1]} as it is used here"
    if "specialized it to be a constant" in everything:
        return "its forward fixes the batch size, for example by a loop over the batch (`for image in images`) or by int(len(images))"
    if "data-dependent" in everything:
        line = re.search(r"Caused by: *\(?([^\n]*)", everything)
        source = re.sub(r"\s*\(_dynamo.*", "", line[1]).strip(" ()") if line else ""
        return "its forward branches on a value that it computes" + (f": {source}" if source else "")
    for text in reversed(texts):
        if lines := _TERMINAL_CODES.sub("", text).strip().splitlines():
            return lines[0].rstrip(".")
    return type(error).__name__


_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def to_open_template(network: Normalised, spec: InputSpec, names: Collection[str]) -> tuple[bytes, set[str]]:
    """The traced graph without the named weights, which are declared external and given when a session is made.

    Returns:
        The graph, and those of the names that it contains. Weights that do not affect its outputs are not in it.

    Raises:
        ExportError: torch cannot export this network.
    """
    model = to_template(network, spec)
    graph = model.graph
    left_out = {tensor.name: tensor for tensor in graph.initializer if tensor.name in names}
    inlined = [tensor for tensor in graph.initializer if tensor.name not in left_out]
    del graph.initializer[:]
    graph.initializer.extend(inlined)
    # They are inputs while constants are folded, so that no constant is computed from one point's weights.
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        for name, tensor in left_out.items()
    )
    with _quiet():
        model = _optimised(model)
    _forget_sources(model)
    graph = model.graph
    images = [value for value in graph.input if value.name not in left_out]
    del graph.input[:]
    graph.input.extend(images)
    used = {name for node in graph.node for name in node.input}
    for name in sorted(left_out.keys() & used):
        tensor = onnx.TensorProto(name=name, data_type=left_out[name].data_type, dims=left_out[name].dims)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="given-from-memory")
        graph.initializer.append(tensor)
    return model.SerializeToString(), left_out.keys() & used


def _fold(template: onnx.ModelProto) -> bytes:
    # Fold constants and merge batch norm into convolutions: without this, ONNX Runtime is half as fast on a traced
    # graph.
    with _quiet():
        model = _optimised(template)
    _forget_sources(model)
    return model.SerializeToString()


def _optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxscript.optimizer  # imported where it is needed: commands start sooner

    return onnxscript.optimizer.optimize(model)


def _forget_sources(model: onnx.ModelProto) -> None:
    # The exporter records source lines of this machine at every node. These must not be published with the file.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""


class Exporter:
    """Exports members of one architecture. The graph is traced once; for later members only the weights are replaced.

    Tracing takes most of the time of an export, and equal modules have equal graphs. If a graph differs, its
    names differ or parity with torch fails, and the member is traced again.
    """

    def __init__(self, spec: InputSpec):
        """Create it; `spec` is what the network takes. It is closed to texts of other lengths if the network is."""
        self.spec = spec
        self._template: onnx.ModelProto | None = None

    def trace(self, network: Normalised) -> tuple[bytes, MemberSession]:
        """Trace the network for this and later exports. Returns its ONNX file and a session on it.

        Raises:
            ExportError: torch cannot export this network, or ONNX Runtime rejects the file.
        """
        template = self._to_template(network)
        refilled = _refill(template, network)  # the file must not depend on the weights that were traced
        self._template = _without_weights(template, network) if _holds_all_weights(template, network) else None
        model = _fold(refilled)
        return model, open_exported(model)

    def _to_template(self, network: Normalised) -> onnx.ModelProto:
        if not self.spec.open_length:
            return to_template(network, self.spec)
        try:
            found = to_template(network, self.spec)
            session = open_exported(_fold(_refill(found, network)))
            if independence.fault(session.logits, kinds.probes(self.spec), self.spec) is None:
                return found
            why = "its answer depends on how far a text is filled up"
        except ExportError as error:
            why = str(error).partition(". Its forward")[0]
        self.spec = self.spec.model_copy(update={"open_length": False})
        logger.info(
            f"note: the network takes texts of {self.spec.shape[0]} tokens only, to which the service fills them up ({why})"
        )
        return to_template(network, self.spec)

    def export(
        self, network: Normalised, images: NDArray[np.float32], device: torch.device
    ) -> tuple[bytes, MemberSession]:
        """Returns the ONNX file and a session on it, after comparing it with torch on the images (batch, C, H, W).

        Raises:
            ExportError: torch cannot export this network, or the outputs differ.
        """
        if self._template is not None:
            model = _fold(_refill(self._template, network))
            session = open_exported(model)
            try:
                check_parity(network, session, images, device)
            except ExportError:
                self._template = None
            else:
                return model, session
        model, session = self.trace(network)
        check_parity(network, session, images, device)
        return model, session


def _weights(network: Normalised) -> dict[str, torch.Tensor]:
    # Counters do not affect the outputs, so they are not in the graph.
    return {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}


def _holds_all_weights(model: onnx.ModelProto, network: Normalised) -> bool:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    names: dict[int, list[str]] = {}
    for name, tensor in _weights(network).items():
        names.setdefault(tensor.data_ptr(), []).append(name)  # a tied weight has several names, and one initializer
    shape_of = {name: tuple(tensor.shape) for name, tensor in _weights(network).items()}
    return all(any(shapes.get(name) == shape_of[name] for name in tied) for tied in names.values())


def _refill(template: onnx.ModelProto, network: Normalised) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(template)
    weights = _weights(network)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(
                numpy_helper.from_array(weights[tensor.name].detach().cpu().float().contiguous().numpy(), tensor.name)
            )
    return model


def _without_weights(template: onnx.ModelProto, network: Normalised) -> onnx.ModelProto:
    # The next member brings its own weights. Keeping these during a training would take the memory of one more network.
    weights = _weights(network)
    for tensor in template.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("raw_data")
    return template


def _trace(network: nn.Module, spec: InputSpec) -> torch.export.ExportedProgram:
    # Traced here, because torch.onnx silently falls back to a graph with a fixed batch size.
    example = torch.from_numpy(kinds.noise(spec, 2))
    axes = ({0: torch.export.Dim("batch")},)
    if spec.open_length:
        axes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=spec.shape[0])},)
    try:
        return torch.export.export(network, (example,), dynamic_shapes=axes, strict=False)
    except Exception:
        # Slower, but it supports Python code that turns the batch axis into a number, such as len(images).
        return torch.export.export(network, (example,), dynamic_shapes=axes, strict=True)


@torch.no_grad()
def torch_logits(network: Normalised, images: NDArray[np.float32], device: torch.device) -> NDArray[np.float32]:
    """Torch's logits in float32 without TF32: (batch, classes)."""
    network = network.to(device).eval()
    with _no_tf32():
        parts = [
            network(layout.arrange(torch.from_numpy(images[i : i + 256]), torch.contiguous_format).to(device))
            .float()
            .cpu()
            for i in range(0, len(images), 256)
        ]
    return torch.cat(parts).numpy()


def check_parity(
    network: Normalised, session: MemberSession, images: NDArray[np.float32], device: torch.device
) -> None:
    """Compare the exported member with torch on real images.

    Raises:
        ExportError: they differ by more than the tolerances.
    """
    expected = torch_logits(network, images, device)
    try:
        found = in_batches(session, images)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ExportError(f"The exported member does not run: {error}. Nothing was published.") from error
    if not np.isfinite(expected).all():
        raise ExportError(
            "The member gives NaN or infinity for real images: its training diverged. Train with a smaller learning rate. Nothing was published."
        )
    largest = float(np.abs(expected).max())
    logits_off = float(np.abs(found - expected).max())
    probs_off = float(np.abs(softmax(found) - softmax(expected)).max())
    logits_limit = LOGITS_TOLERANCE * max(1.0, largest)
    probs_limit = PROBS_TOLERANCE * max(1.0, min(largest, DIVERGED_LOGITS) / _EXACT_LOGITS)
    if not (probs_off <= probs_limit and logits_off <= logits_limit):
        # A deep network may amplify the last bit of a pixel beyond this, and no export can be more exact than that.
        nudged = in_batches(session, kinds.nudged(images))
        logits_limit += _LAST_BITS * float(np.abs(nudged - found).max())
        probs_limit = min(_LOOSEST, probs_limit + _LAST_BITS * float(np.abs(softmax(nudged) - softmax(found)).max()))
    # False for NaN, too.
    if probs_off <= probs_limit and logits_off <= logits_limit:
        return
    if largest > DIVERGED_LOGITS:
        raise ExportError(
            f"The member gives logits for real images up to {largest:.1e}: its training diverged, or nothing scales its output. "
            "Such logits are too inexact in float32 to be compared. Train with a smaller learning rate. Nothing was published."
        )
    raise ExportError(
        f"The exported member differs from torch on {len(images)} real images: probabilities by {probs_off:.2e} "
        f"(limit {probs_limit:.1e}), logits by {logits_off:.2e} (limit {logits_limit:.1e}). Some layer of the network is exported "
        "wrongly, or acts randomly in eval mode. Nothing was published."
    )


def open_exported(model: bytes, weights: Mapping[str, NDArray[np.float32]] | None = None) -> MemberSession:
    """Open a session on an exported graph; `weights` are those that a template leaves out.

    Raises:
        ExportError: ONNX Runtime rejects it.
    """
    try:
        return MemberSession(model, weights=weights)
    except MemberError as error:
        raise ExportError(f"{error} Nothing was published.") from error


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter prints its internal deprecations and guards, on stdout and stderr too. Real problems raise an
    # exception.
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
