"""The manifest of one published version: the typed form of `manifest.json`.

FORMAT.md is the same contract in prose; `tests/models_store/test_format.py` checks that the two agree.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from models_store.errors import ManifestError

READABLE = (1, 2, 3, 4)  # version 1 has no calibration, version 2 takes images only, version 3 has float32 members
ONNX_OPSET = 18
OUTPUT_NAME = "logits"
ECE_BINS = 15
PADDING = 0  # the token id that fills texts up
# Limits of what a reader accepts and a writer may produce. A published manifest has a few kilobytes.
MAX_BYTES = 16 * 2**20
MAX_VALUES = 2**18
MAX_DEPTH = 32
MAX_MEMBERS = 4096
MAX_FILES = 4 * MAX_MEMBERS
NO_DIGEST = "0" * 64
# Beyond these limits, a distribution is numerically one-hot or uniform; far beyond them, logits / T is not finite.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Two path parts, no dots before the suffix: a manifest cannot point outside its own folder.
MemberFile = Annotated[str, Field(pattern=r"^members/[0-9]{3,6}\.onnx$")]
WeightsFile = Annotated[str, Field(pattern=r"^weights/[0-9]{3,6}\.safetensors$")]
VertexFile = Annotated[str, Field(pattern=r"^vertices/[0-9]{3,6}\.safetensors$")]
Temperature = Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)]
CALIBRATION_FILE = "calibration.safetensors"
NOVELTY_FILE = "novelty.safetensors"
TOKENIZER_FILE = "tokenizer.json"
EXAMPLES_FILE = "examples.safetensors"
BANK_FILES = ("bank/template.onnx", "bank/vertices.safetensors", "bank/points.safetensors")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Network(_Record):
    """How to rebuild the members' module: `factory(num_classes, input_shape, **kwargs)`."""

    factory: str
    kwargs: dict[str, Any] = {}


class TableField(_Record):
    """One named field of a table's row, and how it becomes features."""

    name: str = Field(min_length=1)
    categories: list[str] | None = Field(
        default=None, min_length=1, description="values of a category: one feature, 0 or 1, for each; null: a number"
    )
    shape: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None,
        min_length=1,
        description="shape of a tensor, whose numbers are features in order; null: a number or a category",
    )
    low: float | None = Field(default=None, description="smallest allowed value of this field; null: that of the input")
    high: float | None = Field(default=None, description="largest allowed value of this field; null: that of the input")

    @model_validator(mode="after")
    def _of_one_kind(self) -> TableField:
        if self.categories is not None and (self.shape, self.low, self.high) != (None, None, None):
            raise ValueError("a category has neither a shape nor a range")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError("the range of a field must not be empty")
        return self

    @property
    def width(self) -> int:
        """Number of features."""
        return math.prod(self.shape) if self.shape else 1 if self.categories is None else len(self.categories)


class InputSpec(_Record):
    """What the members take: one tensor `(batch, *shape)`."""

    kind: Literal["image", "features", "tokens"] = Field(
        default="image",
        description="image: float32 in [0, 1]; features: float32 numbers of any meaning, of a table, a signal or an embedding; "
        "tokens: int64 ids of a vocabulary",
    )
    shape: tuple[int, ...] = Field(
        min_length=1, description="image: (C, H, W), where C = 1 is grey and C = 3 is RGB; tokens: (largest length,)"
    )
    resize: Literal["refuse", "stretch", "crop"] = Field(
        default="refuse",
        description="what to do with an encoded image of another size: refuse it, stretch it to (H, W), "
        "or scale its short side and crop the centre",
    )
    low: float | None = Field(default=None, description="features: smallest allowed value; null: none")
    high: float | None = Field(default=None, description="features: largest allowed value; null: none")
    missing: Literal["refuse", "mean"] = Field(
        default="refuse",
        description="features: whether NaN is refused, or replaced in the graph by the feature's mean over the training rows",
    )
    fields: list[TableField] | None = Field(
        default=None, min_length=1, description="features: the named fields of a row, in the order of the features"
    )
    vocabulary: int | None = Field(
        default=None,
        ge=2,
        description="tokens: ids are 1 … vocabulary − 1; 0 fills texts up, and stands at their end only",
    )
    open_length: bool = Field(
        default=False,
        description="tokens: whether the members take any length up to the largest; otherwise rows are filled up to it",
    )
    tokenizer: bool = Field(
        default=False, description="tokens: whether the version has a tokenizer, so that requests may send texts"
    )

    @model_validator(mode="after")
    def _consistent(self) -> InputSpec:
        if min(self.shape) < 1:
            raise ValueError("every axis of the input shape must be at least 1")
        if len(self.shape) != {"image": 3, "tokens": 1}.get(self.kind, len(self.shape)):
            raise ValueError("the input shape of images has three axes (C, H, W), that of tokens one")
        if (self.kind == "tokens") != (self.vocabulary is not None):
            raise ValueError("tokens, and only tokens, have a vocabulary")
        if self.tokenizer and self.kind != "tokens":
            raise ValueError("only tokens have a tokenizer")
        if self.kind != "features" and (self.low, self.high, self.missing, self.fields) != (None, None, "refuse", None):
            raise ValueError("only features have a range, missing values or named fields")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError("the range of features must not be empty")
        if self.fields is not None:
            if len({field.name for field in self.fields}) != len(self.fields):
                raise ValueError("two fields of a row have the same name")
            if (sum(field.width for field in self.fields),) != self.shape:
                raise ValueError("the fields of a row do not have as many features as the input shape")
        return self

    @model_serializer(mode="wrap")
    def _of_its_kind(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only the fields of its kind: a manifest of images stays as earlier releases wrote and read it."""
        record: dict[str, Any] = write(self)
        return {name: record[name] for name in _FIELDS_OF_KIND[self.kind]}

    @property
    def tensor(self) -> str:
        """Name of the members' input."""
        return "images" if self.kind == "image" else "inputs"


_FIELDS_OF_KIND = {
    "image": ("shape", "resize"),
    "features": ("kind", "shape", "low", "high", "missing", "fields"),
    "tokens": ("kind", "shape", "vocabulary", "open_length", "tokenizer"),
}


class Scores(_Record):
    """Scores on one split, after temperature."""

    accuracy: float = Field(ge=0, le=1)
    nll: float = Field(ge=0, description="mean negative log-likelihood, nats")
    brier: float = Field(ge=0, le=2, description="mean squared distance to the one-hot label, summed over classes")
    ece: float = Field(ge=0, le=1, description=f"expected calibration error, {ECE_BINS} equal-width bins")


class Origin(_Record):
    """Where a member comes from. Fields that do not apply are null."""

    cycle: int | None = Field(
        default=None,
        ge=0,
        description="1, 2, … in order of collection; 0 for an initial network. SWAG: number of the sampled Gaussian",
    )
    epoch: float | None = Field(default=None, ge=0, description="budget spent when it was collected, in epochs")
    leg: str | None = Field(default=None, description="the leg of training that it was collected in")
    coefficients: list[float] | None = Field(default=None, description="weights of the vertices, for path points")
    source: str | None = Field(default=None, description="file name of an imported model")


class Member(_Record):
    """One network of the average."""

    file: MemberFile
    weights: WeightsFile | None = Field(default=None, description="the same weights by torch name; null if imported")
    origin: Origin
    weight: float = Field(gt=0, le=1, description="share of the average; the shares sum to 1")
    temperature: Temperature = Field(default=1.0, description="temperature for answers from this member alone")
    validation: Scores | None = None


class Quantization(_Record):
    """The members in fewer bits, and what that cost."""

    format: Literal["int8", "bf16"] = Field(
        description="int8: weights and activations; bf16: weights, which are converted to float32 when the member is loaded"
    )
    inputs: int | None = Field(
        default=None, ge=1, description="largest number of training inputs that ranges of activations were measured on"
    )
    float32: Scores = Field(description="scores of the average on the validation split before quantisation")


class Geometry(_Record):
    """The shape in weight space that the members lie on."""

    shape: str = Field(min_length=1, description="segment, polychain, bezier, simplex, complex, …")
    vertices: list[VertexFile] = Field(min_length=1, description="files of the trained weight sets, by torch name")
    components: list[list[int]] = Field(
        min_length=1, description="indices into vertices, one list per curve (in order) or simplex"
    )


class Bank(_Record):
    """The folder `bank/`, which holds many networks of the path."""

    points: int = Field(ge=1, description="number of networks")
    accuracy_mean: float = Field(ge=0, le=1, description="mean accuracy of the points on the validation split")
    accuracy_min: float = Field(ge=0, le=1, description="accuracy of the worst point")


class Cascade(_Record):
    """The order in which members answer in the mode `cascade`, and when a row needs no more of them."""

    order: list[int] = Field(min_length=2, description="indices of all members, in the order in which they run")
    groups: list[int] = Field(min_length=2, description="number of members in each group; they sum to all members")
    temperatures: list[Temperature] = Field(description="T of the average of all members up to each group")
    margins: list[float] | None = Field(
        default=None,
        description="after each group but the last: a row leaves if its two largest probabilities differ by at least this much; "
        "null if there were too few images to guarantee anything",
    )
    disagreement: float | None = Field(
        default=None, gt=0, lt=1, description="bound on the share of rows whose label differs from that of all members"
    )


class Novelty(_Record):
    """The detector of images unlike those of the training; `novelty.safetensors` holds its tensors."""

    member: int = Field(ge=0, description="index of the member whose features are used")
    tensor: str = Field(min_length=1, description="the value of its graph that holds the features")
    features: int = Field(ge=1, description="number of features")
    images: int = Field(ge=1, description="number of images that it was fitted on")
    source: str = Field(description="these images: a split of a data set, or a file. It is never shown to clients")


class Calibration(_Record):
    """What `calibration.safetensors` holds, and what it was measured on."""

    images: int = Field(ge=1, description="number of calibration images")
    seed: int = Field(ge=0, description="seed of the division of the split, and of the numbers u of prediction sets")
    source: str = Field(description="the images: a split of a data set, or a file. It is never shown to clients")
    ways: list[Literal["average", "drawn"]] = Field(
        min_length=1, description="ways of answering that were calibrated: all members, and one network for each image"
    )
    cascade: Cascade | None = Field(default=None, description="null if there is one member")
    novelty: Novelty | None = Field(
        default=None, description="null if no member has suitable features: then novelty is the predictive entropy"
    )


class Provenance(_Record):
    """What is needed to repeat the training. It is for the operator and is never shown to clients."""

    run: str | None = Field(default=None, description="identity of the training run; one run is published once")
    config: dict[str, Any] = {}
    commit: str | None = None
    libraries: dict[str, str] = {}
    data_fingerprint: str | None = None
    wall_seconds: float | None = Field(default=None, ge=0)
    epochs_spent: float | None = Field(
        default=None,
        ge=0,
        description="cost of forward and backward passes, in epochs of the train split, without initial networks",
    )
    epochs_forward: float | None = Field(
        default=None,
        ge=0,
        description="cost of other forward passes, in epochs: batch-norm re-estimation for each member and bank point",
    )
    device: str | None = None


class Draft(_Record):
    """Everything about a version that its publisher supplies. The store adds name, version, time and hashes."""

    method: str = Field(min_length=1)
    network: Network | None = Field(default=None, description="null when the members were imported")
    input: InputSpec
    classes: list[str] = Field(min_length=2)
    members: list[Member] = Field(min_length=1, max_length=MAX_MEMBERS)
    temperature: Temperature = Field(default=1.0, description="one T for all members' logits in `average`")
    validation: Scores | None = Field(default=None, description="the average's scores on the validation split")
    quantization: Quantization | None = Field(default=None, description="null, or left out, if the members are float32")
    geometry: Geometry | None = Field(default=None, description="null if each member was trained directly")
    bank: Bank | None = Field(default=None, description="null when there is no bank/")
    calibration: Calibration | None = Field(
        default=None, description="null if the version is not calibrated; must be null in schema version 1"
    )
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _consistent(self) -> Draft:
        if abs(sum(m.weight for m in self.members) - 1) > 1e-6:
            raise ValueError("the members' weights must sum to 1")
        if len({m.file for m in self.members}) != len(self.members):
            raise ValueError("two members share one file")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("class names must be distinct")
        if not all(map(_is_text, self.classes)):
            raise ValueError("a class name cannot be written in UTF-8")
        if self.geometry is not None:
            count = len(self.geometry.vertices)
            if any(not 0 <= index < count for component in self.geometry.components for index in component):
                raise ValueError(f"a component names a vertex that is not among the {count}")
        novelty = self.calibration and self.calibration.novelty
        if novelty and novelty.member >= len(self.members):
            raise ValueError(f"novelty names member {novelty.member} of {len(self.members)}")
        if self.calibration is not None and (cascade := self.calibration.cascade) is not None:
            count, stages = len(self.members), len(cascade.groups)
            if sorted(cascade.order) != list(range(count)) or sum(cascade.groups) != count or min(cascade.groups) < 1:
                raise ValueError(f"the cascade does not run each of the {count} members once")
            margins = len(cascade.margins) if cascade.margins is not None else stages - 1
            if len(cascade.temperatures) != stages or margins != stages - 1:
                raise ValueError(
                    f"the cascade does not have a temperature and a margin for each of its {stages} groups"
                )
        return self


class Manifest(Draft):
    """A published version."""

    schema_version: Literal[1, 2, 3, 4]
    digest: Sha256 | None = Field(
        default=None,
        description="sha256 of manifest.json with 64 zeros in place of the digits; null in the first releases",
    )
    name: str
    version: int = Field(ge=1)
    created: str = Field(description="UTC time of publication, ISO 8601")
    files: dict[str, Sha256] = Field(description="sha256 of every other file of the version, by relative path")

    @model_validator(mode="after")
    def _files_are_listed(self) -> Manifest:
        for member in self.members:
            for file in (member.file, member.weights):
                if file is not None and file not in self.files:
                    raise ValueError(f"{file} has no entry in `files`")
        if self.schema_version == 1 and self.calibration is not None:
            raise ValueError("a calibration needs schema version 2")
        if self.schema_version < 3 and self.input.kind != "image":
            raise ValueError("inputs other than images need schema version 3")
        if self.schema_version < 4 and self.quantization is not None:
            raise ValueError("quantised members need schema version 4")
        named = [*(self.geometry.vertices if self.geometry else ()), *(BANK_FILES if self.bank else ())]
        named += [TOKENIZER_FILE] if self.input.tokenizer else []
        named += [CALIBRATION_FILE] if self.calibration else []
        named += [NOVELTY_FILE] if self.calibration and self.calibration.novelty else []
        for file in named:
            if file not in self.files:
                raise ValueError(f"{file} has no entry in `files`")
        for path in self.files:
            if path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
                raise ValueError(f"{path!r} in `files` leaves the version's folder")
        return self

    @staticmethod
    def schema_of(draft: Draft) -> Literal[1, 2, 3, 4]:
        """The lowest schema version that can express a draft, so that earlier releases read what they can."""
        if draft.quantization:
            return 4
        return 3 if draft.input.kind != "image" else 2 if draft.calibration else 1

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Manifest:
        """Read a manifest.

        Args:
            text: the unchanged content of `manifest.json`.
            where: the file, for messages.

        Raises:
            ManifestError: the text is not JSON, is larger or deeper than a manifest may be, has another schema version,
                breaks a rule of FORMAT.md, or differs from the text that was published.
        """
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        record = _json(content, where)
        found: Any = record.get("schema_version")
        if type(found) is not int or found not in READABLE:
            raise ManifestError(
                f"{where} has schema version {found!r:.60}; this release reads versions {READABLE[0]} to {READABLE[-1]}. "
                "Upgrade modepath, or publish the ensemble again with this release."
            )
        for field, most in (("members", MAX_MEMBERS), ("files", MAX_FILES)):
            if isinstance(held := record.get(field), list | dict) and len(cast("list[Any]", held)) > most:
                raise ManifestError(f"{where} breaks FORMAT.md at {field}: more than {most} entries. Publish again.")
        try:
            manifest = cls.model_validate_json(content, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])[:120] or "manifest"
            field = field if field.isprintable() else ascii(field)
            raise ManifestError(
                f"{where} breaks FORMAT.md at {field}: {first['msg']}. It was changed after publishing, or made by "
                "another tool. Restore it from a copy, or publish again."
            ) from None
        if manifest.digest is not None and manifest.digest != _digest(content, manifest.digest):
            raise ManifestError(
                f"{where} is not the manifest that was published: its digest differs. "
                "Restore it from a copy, or publish again."
            )
        return manifest

    def sealed(self) -> Manifest:
        """A copy that contains the digest of its text."""
        text = self.model_copy(update={"digest": NO_DIGEST}).dump()
        return self.model_copy(update={"digest": hashlib.sha256(text.encode()).hexdigest()})

    def dump(self) -> str:
        """The text of `manifest.json`. Seal a manifest before it is written."""
        record = self.model_dump(
            mode="json", exclude={name for name in ("digest", "quantization") if getattr(self, name) is None}
        )
        return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _digest(content: bytes, claimed: str) -> str | None:
    """The digest that a manifest must have; None unless the claimed one occurs in it exactly once."""
    before, *after = content.split(claimed.encode())
    return hashlib.sha256(before + NO_DIGEST.encode() + after[0]).hexdigest() if len(after) == 1 else None


def _json(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object in UTF-8 of bounded size, depth and number of values, without duplicate keys."""
    again = "It was changed after publishing. Restore it from a copy, or publish again."
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"{len(content)} bytes; at most {MAX_BYTES}")
        text = content.decode()
        # Checked before any object is created: a list of millions would take seconds and gigabytes.
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        record: Any = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
        if not isinstance(record, dict):
            raise ValueError("it is not an object")
        _check_depth(record)
        json.dumps(record, ensure_ascii=False).encode()  # fails for a lone surrogate, which UTF-8 cannot encode
    except RecursionError:
        raise ManifestError(f"{where} is nested more than {MAX_DEPTH} deep. {again}") from None
    except ValueError as error:
        raise ManifestError(f"{where} is not JSON as FORMAT.md requires ({error}). {again}") from None
    return cast("dict[str, Any]", record)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"{key!r:.60} is given twice")
        record[key] = value
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    if (number := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _check_depth(record: Any) -> None:
    level: list[Any] = [record]
    for _ in range(MAX_DEPTH):
        level = [
            inner for one in level for inner in (cast("dict[str, Any]", one).values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]  # fmt: skip
        if not level:
            return
    raise RecursionError


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
