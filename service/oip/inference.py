"""What tensors mean for an ensemble: its inputs as a request of the service, its answer as outputs.

An ensemble that takes one tensor has the input `input`; one with named fields has an input for each field. Instead of
`input`, a client may send `images` (PNG, JPEG or WebP files) or `texts`, each a tensor of BYTES. The options of a request
are its parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from models_store.inputs import kinds
from models_store.manifest import InputSpec, Manifest
from models_store.uncertainty import UNCERTAINTY_MEASURES, combine
from service.http import images
from service.http.bodies import Asked, validated
from service.http.columns import Column, Columns
from service.http.errors import BadRequestError
from service.http.images import Encoded, Images, Limits
from service.http.schemas import Options
from service.inference.opening import Ensemble
from service.inference.pieces import Answer
from service.inference.policy import TOGETHER, Mode
from service.inference.session import Rows
from service.oip.messages import Infer
from service.oip.tensors import BYTES, Tensor
from service.predicting import Answered

log = logging.getLogger("bentoml.modepath")
NAME = "input"
ENCODED = "images"
TEXTS = "texts"
# The datatype of each output. Fields within a field are named with a dot, as `uncertainty.disagreement`.
OUTPUTS = {
    "label": "INT64",
    "class_name": BYTES,
    "confidence": "FP32",
    "probs": "FP32",  # (batch, classes)
    **{f"novelty.{name}": "FP32" for name in ("score", "percentile")},
    **{f"percentiles.{name}": "FP32" for name in UNCERTAINTY_MEASURES},
    "prediction_set": "BOOL",  # (batch, classes): whether each class is in the set
    "decision": BYTES,
    "reason": BYTES,  # "" if the decision needs none
    "point": "INT64",
    **{
        f"uncertainty.{name}": "FP32"
        for name in ("predictive_entropy", "expected_entropy", "mutual_information", "disagreement")
    },
    "members_used": "INT64",
    "members": "FP32",  # (batch, members, classes)
}
# Parameters that clients of other servers send, and that mean nothing here.
IGNORED = {"binary_data_output", "priority", "timeout"}


def asked(request: Infer, ensemble: str, version: int | None) -> Asked:
    """Return a request to an ensemble as the service knows it.

    Raises:
        BadRequestError: a parameter is unknown or invalid, or an output has an unknown name.
    """
    if unknown := next((name for name in request.outputs or () if name not in OUTPUTS), None):
        raise BadRequestError(f"Output {unknown[:80]!r} is unknown. The outputs are {', '.join(OUTPUTS)}.")
    record = {name: value for name, value in request.parameters.items() if name not in IGNORED}
    if "ensemble" in record:
        raise BadRequestError("The name of the ensemble is in the address of the request, not in `parameters`.")
    wanted = request.outputs or ()
    if "members" in wanted:
        record.setdefault("members", True)
    if any(name.startswith("percentiles.") for name in wanted):
        record.setdefault("percentiles", True)
    options = validated(Options, Options.model_validate, {**record, "ensemble": ensemble})
    only = request.inputs[0] if len(request.inputs) == 1 and request.inputs[0].datatype == BYTES else None
    rows = max((one.shape[0] for one in request.inputs), default=0)
    return Asked(
        options, partial(_opened, request.inputs), encoded=only is not None and only.name == ENCODED, version=version,
        named=rows if len(request.inputs) > 1 else 0, texts=only.texts() if only is not None and only.name == TEXTS else None,
        check=None if request.outputs is None else partial(_check_outputs, list(request.outputs), options),
    )  # fmt: skip


def _opened(inputs: Sequence[Tensor], spec: InputSpec, limits: Limits) -> Images | Encoded:
    expected = {name: datatype for name, datatype, _ in inputs_of(spec)}
    given = {one.name: one for one in inputs}
    if spec.fields is None and list(given) == [ENCODED] and isinstance(files := given[ENCODED].values, list):
        return images.open_encoded(files, f"Element {{}} of the input `{ENCODED}`", spec, limits)
    if len(given) < len(inputs):
        raise BadRequestError("An input is given twice; give each once.")
    for name, one in given.items():
        if (datatype := expected.get(name)) is None:
            raise BadRequestError(f"Unexpected input {name[:80]!r}; this ensemble takes {', '.join(expected)}.")
        if one.datatype != datatype:
            raise BadRequestError(f"Input {name!r} has the datatype {one.datatype}; it takes {datatype}.")
    if spec.fields is None:
        values = given[NAME].values
        assert not isinstance(values, list), "its datatype is a number"
        return images.from_array(f"Input {NAME!r}", values, spec, limits)
    columns = {name: one.texts() if one.datatype == BYTES else one.values for name, one in given.items()}
    return images.from_columns(columns, spec, limits)


def inputs_of(spec: InputSpec) -> list[tuple[str, str, list[int]]]:
    """Name, datatype and shape of each input; -1 stands for an axis of any size."""
    if spec.fields is None:
        if spec.kind == "tokens":
            return [(NAME, "INT64", [-1, -1])]
        return [(NAME, "FP32", [-1, *spec.shape])]
    return [
        (one.name, BYTES, [-1]) if one.categories is not None else (one.name, "FP32", [-1, *(one.shape or ())])
        for one in spec.fields
    ]


def outputs_of(ensemble: Ensemble) -> list[tuple[str, str, list[int]]]:
    """Name, datatype and shape of each output of a request without parameters."""
    found = outputs(_example(ensemble, ensemble.policy.modes[0], Options()), None)
    return [(one.name, one.datatype, [-1, *one.shape[1:]]) for one in found]


def _example(ensemble: Ensemble, mode: Mode, options: Options) -> Answered:
    """An answer of the form that such a request gets. No network is drawn for it."""
    manifest = ensemble.manifest
    classes, members = len(manifest.classes), len(manifest.members) if mode == "average" else 1
    probs = np.full((members, 1, classes), 1 / classes)
    used = np.ones(1, np.intp) if mode == "cascade" else None
    answer = Answer(None if used is not None else probs, combine(probs, np.full(members, 1 / members)), 0.0, 0.0, used)
    row = np.zeros((1, *manifest.input.shape), kinds.dtype(manifest.input))
    decided = ensemble.decisions.decide(mode, options, row, answer.prediction)
    return Answered(manifest, ensemble.policy, mode, options, "", Rows(row), answer, decided)


# The names of the outputs, by version, mode, and what of a request decides them.
_names: dict[tuple[object, ...], frozenset[str]] = {}
MOST_NAMES = 4096  # of these: versions come and go


def _check_outputs(wanted: Sequence[str], options: Options, ensemble: Ensemble, mode: Mode) -> None:
    """Refuse a request that names outputs which its answer will not have, before any work is spent on it."""
    decided = options.risk is not None or options.wrong_cost is not None
    key = ensemble.identity, mode, options.coverage is not None, decided, options.percentiles, options.members
    if (names := _names.get(key)) is None:
        if len(_names) >= MOST_NAMES:
            _names.clear()
        names = _names[key] = frozenset(one.name for one in outputs(_example(ensemble, mode, options), None))
    if missing := next((name for name in wanted if name not in names), None):
        raise BadRequestError(
            f"Output {missing!r} is not part of this answer in mode {mode!r}: it needs another mode, a parameter such as `coverage` or `risk`, or a policy that shows it. "
            f"This answer has {', '.join(name for name in OUTPUTS if name in names)}."
        )


def outputs(answered: Answered, wanted: Mapping[str, bool] | None) -> list[Tensor]:
    """Return the outputs of an answer: those that were named, in their order, or all.

    Where a network is drawn for each row, outputs of BYTES are left out: the length of an answer must not depend on its content.
    """
    flat = dict(_flat(answered.columns()))
    fixed = answered.mode not in TOGETHER
    found = [name for name in OUTPUTS if name in flat and not (fixed and OUTPUTS[name] == BYTES)]
    if wanted is not None:
        found = list(wanted)  # `asked` has refused those that are missing
    return [_tensor(name, flat[name], len(answered.manifest.classes)) for name in found]


def _flat(columns: Columns) -> Iterator[tuple[str, Column]]:
    for name, column in columns.items():
        if isinstance(column, dict):
            for inner, values in column.items():
                yield f"{name}.{inner}", values
        else:
            yield name, column


def _tensor(name: str, column: Column, classes: int) -> Tensor:
    datatype = OUTPUTS[name]
    if datatype == BYTES:
        return Tensor.of_texts(name, ["" if one is None else one for one in column])
    if name == "prediction_set":
        mask = np.zeros((len(column), classes), np.bool_)
        for row, labels in zip(mask, column, strict=True):
            row[np.array(labels, np.intp)] = True
        return Tensor.of(name, datatype, mask)
    return Tensor.of(name, datatype, np.asarray(column))


def parameters_of(answered: Answered) -> dict[str, Any]:
    """What an answer says beside its outputs."""
    found: dict[str, Any] = {"mode": answered.mode, "request_id": answered.request_id}
    if answered.mode == "average":
        found["members_used"] = len(answered.manifest.members)
    return found


def metadata(ensemble: Ensemble) -> dict[str, Any]:
    """The description of an ensemble in the protocol's form."""
    manifest: Manifest = ensemble.manifest

    def listed(tensors: Sequence[tuple[str, str, list[int]]]) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in tensors]

    return {
        "name": manifest.name, "versions": [str(manifest.version)], "platform": "modepath_ensemble",
        "inputs": listed(inputs_of(manifest.input)), "outputs": listed(outputs_of(ensemble)),
    }  # fmt: skip
