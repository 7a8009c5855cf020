"""The fields of requests and responses. The values of a response come from columns.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import orjson
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 - pydantic reads typing's own only from Python 3.12 on

from models_store.bank import Points
from models_store.decisions import abstention
from models_store.decisions.calibration import Calibration, Decision, Reason
from models_store.decisions.conformal import Method
from models_store.decisions.leaving import Rule
from models_store.manifest import Manifest, Scores
from models_store.uncertainty import Floats
from service.http import columns
from service.inference.decisions import NOTHING, Decided
from service.inference.pieces import Answer
from service.inference.policy import Mode, Policy

log = logging.getLogger("bentoml.modepath")


class Options(BaseModel):
    """Options of every request: fields of a JSON body, or query parameters with an array or an image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ensemble: str | None = Field(
        default=None,
        max_length=64,
        description="name of the ensemble that answers (default: the default ensemble of the service)",
    )
    mode: Mode | None = Field(
        default=None,
        description="how the ensemble answers. average: all members together; cascade: members in groups, until an image is decided; random: one randomly drawn network for each image; keyed: like "
        "random, but the same image gets the same network until the key changes (default: the first mode that the policy opens)",
    )
    members: bool = Field(default=False, description="also return each member's probabilities")
    coverage: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="also return prediction sets, which contain the true class with this probability",
    )
    set_method: Method | None = Field(
        default=None,
        description="score of the prediction sets. lac: the smallest sets; aps: sets that grow with difficulty; raps: aps without large sets "
        "(default: lac)",
    )
    per_class: bool = Field(
        default=False, description="the coverage holds for each true class that has enough calibration images"
    )
    allow_empty: bool = Field(
        default=False, description="return empty sets too; otherwise the most probable class is in every set"
    )
    risk: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decide for each image whether to answer, such that at most this share of the answers is wrong",
    )
    wrong_cost: float | None = Field(
        default=None,
        gt=0,
        le=1e12,
        description="decide by expected cost: the cost of a wrong answer; needs review_cost",
    )
    review_cost: float | None = Field(
        default=None, gt=0, le=1e12, description="the cost of a review by a person, in the unit of wrong_cost"
    )
    rule: Rule | None = Field(
        default=None,
        description="in cascade, when an image is decided. calibrated: the label differs from that of `average` at most as often as /ensembles "
        "says; exact: never (default: calibrated)",
    )
    percentiles: bool = Field(
        default=False, description="also return the percentile of each uncertainty measure among the calibration images"
    )


class PredictRequest(Options):
    """The JSON body of POST /predict: one of `inputs`, `images` and `texts`."""

    # images.py checks the pixels: pydantic would visit each of them in Python.
    inputs: list[Any] | dict[str, Any] | None = Field(
        default=None,
        description="images (batch, C, H, W) of floats in [0, 1]; features (batch, …), rows with named fields, or a batch of each field by "
        "name; or texts of token ids",
    )
    images: list[str] | None = Field(default=None, fail_fast=True, description="PNG, JPEG or WebP files in base64")
    texts: list[str] | None = Field(
        default=None, fail_fast=True, description="texts, which the tokenizer of the ensemble turns into token ids"
    )


# Answers are plain dictionaries: they are written for every row of every request and never parsed here, so models
# would only cost time.
class Uncertainty(TypedDict):
    """Entropies in nats; see models_store/uncertainty.py."""

    predictive_entropy: Annotated[float, Field(description="entropy of the averaged distribution: total uncertainty")]
    expected_entropy: Annotated[
        float, Field(description="mean entropy of the members: the uncertainty of each member alone")
    ]
    mutual_information: Annotated[
        float, Field(description="predictive minus expected entropy: what the members disagree on")
    ]
    disagreement: Annotated[float, Field(description="share of members whose top class is not the ensemble's")]


class Novelty(TypedDict):
    """How unlike the training images an image is."""

    score: Annotated[
        float,
        Field(
            description="squared Mahalanobis distance of the features from the nearest class of the training; predictive entropy in "
            "nats where the version or the mode has no features"
        ),
    ]
    percentile: Annotated[float, Field(description="share of calibration images that are at most as novel, in percent")]


class RowPrediction(TypedDict):
    """The answer for one image."""

    label: int
    class_name: str
    confidence: NotRequired[float]
    probs: NotRequired[
        Annotated[list[float], Field(description="probabilities (classes); the policy may round or omit them")]
    ]
    uncertainty: NotRequired[Annotated[Uncertainty, Field(description="uncertainty measures; only in `average`")]]
    novelty: NotRequired[Annotated[Novelty, Field(description="only if the version is calibrated")]]
    percentiles: NotRequired[
        Annotated[
            dict[str, float], Field(description="percentile of each uncertainty measure, 0 to 100; only if requested")
        ]
    ]
    prediction_set: NotRequired[
        Annotated[list[int], Field(description="classes of the set, the most probable one first; only with `coverage`")]
    ]
    decision: NotRequired[
        Annotated[Decision, Field(description="whether to rely on the answer; only with a risk or costs")]
    ]
    members_used: NotRequired[Annotated[int, Field(description="number of members that ran; only in `cascade`")]]
    reason: NotRequired[
        Annotated[
            Reason | None,
            Field(description="why to abstain: the answer is uncertain, or the image is unlike those of the training"),
        ]
    ]
    point: NotRequired[Annotated[int, Field(description="which network answered; only if the policy shows it")]]
    members: NotRequired[
        Annotated[
            list[list[float]], Field(description="each member's probabilities (members, classes); only if requested")
        ]
    ]


class PredictResponse(TypedDict):
    """The answer to POST /predict."""

    ensemble: str
    version: int
    mode: Mode
    members_used: NotRequired[Annotated[int, Field(description="number of members that answered; only in `average`")]]
    request_id: str
    predictions: list[RowPrediction]


class PoolInfo(BaseModel):
    """The single networks that each worker holds ready to run."""

    mebibytes: int = Field(
        description="memory that the networks take, approximately, in MiB; of a defended ensemble the limit instead, because the actual size "
        "would reveal the number of networks"
    )
    networks: int | None = Field(
        description="number of networks that are ready; null for a defended ensemble, because the number helps an attacker"
    )
    of: int | None = Field(
        description="number of networks of the ensemble; those that are not ready replace others in turn; null for a defended ensemble"
    )


class ReliabilityBin(BaseModel):
    """Calibration images of similar confidence. Calibrated answers have an accuracy near their confidence."""

    confidence: float = Field(description="mean confidence of the images")
    accuracy: float = Field(description="share of the images that were labelled rightly")
    images: int


class CalibrationInfo(BaseModel):
    """What the decisions of an ensemble can guarantee in its first mode."""

    images: int = Field(description="number of calibration images")
    most_coverage: float = Field(description="largest coverage of prediction sets")
    least_risk: float | None = Field(
        description="smallest risk of abstention, to two digits; null if none can be guaranteed"
    )
    confidence: float = Field(
        description="probability, over the choice of the calibration images, that the bound on the risk holds"
    )
    classes_without_guarantee: list[str] = Field(
        description="classes that have too few calibration images for a coverage of 0.9 of their own (per_class)"
    )
    novelty: Literal["features", "predictive_entropy"] = Field(
        description="what novelty measures in average: the distance of features from those of training images, or the predictive "
        "entropy. In modes that draw a network it is the predictive entropy"
    )
    cascade_groups: list[int] | None = Field(description="members in each group of a cascade; null without one")
    cascade_disagreement: float | None = Field(
        description="bound on the share of images that a calibrated cascade labels otherwise than average; null without one"
    )
    reliability: list[ReliabilityBin] = Field(
        description="calibration images by confidence, in bins of equal width that are not empty"
    )
    note: str | None = Field(description="what the number of calibration images does not allow")


class PathPoint(TypedDict):
    """One network of the curve, and its answer."""

    point: Annotated[int, Field(description="number of the network")]
    t: Annotated[float, Field(description="parameter of the curve, 0 to 1")]
    accuracy: Annotated[float, Field(description="of this network alone, on the validation split")]
    nll: Annotated[
        float, Field(description="negative log-likelihood of this network alone, on the validation split, nats")
    ]
    probs: list[float]


class PathResponse(TypedDict):
    """The answer to POST /ensembles/{name}/path."""

    ensemble: str
    version: int
    shape: Annotated[str, Field(description="segment, polychain or bezier")]
    points: list[PathPoint]


class FieldInfo(BaseModel):
    """A named field of a row."""

    name: str
    categories: list[str] | None = Field(description="allowed texts; null for a number or a tensor")
    shape: tuple[int, ...] | None = Field(description="shape of a tensor; null for a number or a category")


class EnsembleInfo(BaseModel):
    """What a client may know about an ensemble: a whitelist.

    Seeds, commits and fingerprints are left out, because training could be repeated with them.
    """

    name: str
    version: int
    method: str
    members: int | None = Field(description="number of members; null for a defended ensemble")
    input_kind: Literal["image", "features", "tokens"]
    input_shape: tuple[int, ...] = Field(description="(C, H, W) of images; (largest length,) of texts")
    resize: str
    fields: list[FieldInfo] | None = Field(description="named fields of a row; null if it has none")
    vocabulary: int | None = Field(description="number of token ids; null if it takes no tokens")
    texts: bool = Field(description="whether requests may send `texts` instead of token ids")
    classes: list[str]
    validation: Scores | None
    providers: list[str]
    modes: list[Mode]
    pool: PoolInfo | None
    calibration: CalibrationInfo | None = Field(description="null if the version is not calibrated, or defended")
    path: bool = Field(
        default=False, description="whether POST /ensembles/{name}/path shows the answer of every network of its curve"
    )
    default: bool


class VersionInfo(BaseModel):
    """One published version of an ensemble: a whitelist, as for EnsembleInfo."""

    version: int
    served: bool = Field(description="whether this version answers now")
    created: str = Field(description="UTC time of publication, ISO 8601")
    method: str
    members: int
    input_kind: Literal["image", "features", "tokens"]
    input_shape: tuple[int, ...] = Field(description="(C, H, W) of images; (largest length,) of texts")
    resize: str
    classes: list[str]
    temperature: float
    calibration_images: int | None = Field(description="null if the version is not calibrated")
    validation: Scores | None


class VersionList(BaseModel):
    """The answer to GET /ensembles/{name}/versions."""

    versions: list[VersionInfo] = Field(description="the newest versions, the newest first")
    damaged: list[int] = Field(description="numbers of versions that cannot be read; the store's `verify` says why")


class EnsembleList(BaseModel):
    """The answer to GET /ensembles."""

    ensembles: list[EnsembleInfo]


class Status(BaseModel):
    """The answer to GET /livez and GET /readyz."""

    status: str


class ErrorBody(BaseModel):
    """The body of every refusal."""

    error: str = Field(description="what was wrong, the likely cause, and what to do")


def respond(
    manifest: Manifest,
    request_id: str,
    mode: Mode,
    answer: Answer,
    policy: Policy,
    *,
    members: bool,
    points: Sequence[int] = (),
    decided: Decided = NOTHING,
) -> PredictResponse:
    """Build the response from the parts of an answer that the policy shows; the arguments are those of `columns.shown`."""
    shown = columns.shown(manifest.classes, mode, answer, policy, members=members, points=points, decided=decided)
    rows = cast(list[RowPrediction], columns.by_row(shown))
    response: PredictResponse = {
        "ensemble": manifest.name, "version": manifest.version, "mode": mode, "request_id": request_id, "predictions": rows,
    }  # fmt: skip
    if mode == "average":
        response["members_used"] = len(manifest.members)
    return response


def along_path(manifest: Manifest, points: Points, probs: Floats) -> PathResponse:
    """Build the answer of every point of a curve; `probs` is (points, classes)."""
    assert manifest.geometry is not None, "a curve has a geometry"
    columns = points.positions(), points.accuracy, points.nll, probs
    return {
        "ensemble": manifest.name,
        "version": manifest.version,
        "shape": manifest.geometry.shape,
        "points": [
            {"point": number, "t": t, "accuracy": accuracy, "nll": nll, "probs": row}
            for number, (t, accuracy, nll, row) in enumerate(zip(*(column.tolist() for column in columns), strict=True))
        ],
    }


def padded(reply: bytes, manifest: Manifest, policy: Policy, mode: Mode, rows: int) -> bytes:
    """Pad a reply with blanks, so that its length does not depend on its content.

    The length is an upper bound of what `respond` can write. A longer reply is padded to whole KiB and logged as an
    error.
    """
    digits = policy.digits(mode)
    number = {"none": 0, "exact": 25}.get(str(digits)) if isinstance(digits, str) else digits + 4  # the comma included
    name = max(len(orjson.dumps(one)) for one in manifest.classes)
    row = 100 + name + (len(manifest.classes) + 1) * (number or 0)
    row += 450 + 8 * len(manifest.classes) if digits == "exact" and manifest.calibration else 0  # decisions
    row += 60 if policy.risk is not None else 0
    length = 200 + len(manifest.name) + rows * row
    if len(reply) > length:
        log.error(
            "An answer of %s has %d bytes where at most %d were expected: its length may reveal its content. Please report this.",
            manifest.name, len(reply), length,
        )  # fmt: skip
        length = -(-len(reply) // 1024) * 1024
    return reply.ljust(length)


def describe(
    manifest: Manifest,
    providers: list[str],
    policy: Policy,
    pool: PoolInfo | None,
    calibration: Calibration | None = None,
    *,
    is_default: bool,
    path: bool = False,
) -> EnsembleInfo:
    """Return the description of an ensemble that `/ensembles` shows."""
    return EnsembleInfo(
        name=manifest.name,
        version=manifest.version,
        method=manifest.method,
        members=None if policy.defended else len(manifest.members),
        input_kind=manifest.input.kind,
        input_shape=manifest.input.shape,
        resize=manifest.input.resize,
        fields=[
            FieldInfo(name=one.name, categories=one.categories, shape=one.shape) for one in manifest.input.fields or ()
        ]
        or None,
        vocabulary=manifest.input.vocabulary,
        texts=manifest.input.tokenizer,
        classes=manifest.classes,
        validation=manifest.validation,
        providers=providers,
        modes=list(policy.modes),
        pool=pool,
        calibration=_guarantees(manifest, calibration) if calibration and not policy.defended else None,
        path=path,
        default=is_default,
    )


def describe_version(manifest: Manifest, *, served: bool) -> VersionInfo:
    """Return the description of a published version that `/ensembles/{name}/versions` shows."""
    return VersionInfo(
        version=manifest.version,
        served=served,
        created=manifest.created,
        method=manifest.method,
        members=len(manifest.members),
        input_kind=manifest.input.kind,
        input_shape=manifest.input.shape,
        resize=manifest.input.resize,
        classes=manifest.classes,
        temperature=manifest.temperature,
        calibration_images=manifest.calibration.images if manifest.calibration else None,
        validation=manifest.validation,
    )


def _guarantees(manifest: Manifest, calibration: Calibration) -> CalibrationInfo:
    record = manifest.calibration
    cascade = record.cascade if record else None
    least, most = calibration.least_risk, calibration.most_coverage
    missing = [f"a coverage above {most:.3g}"] if most < 0.95 else []
    missing += ["calling an image novel"] if calibration.images < 99 else []
    missing += [] if least is not None and least <= 0.1 else ["a risk of 0.1 or less"]
    return CalibrationInfo(
        images=calibration.images,
        most_coverage=most,
        least_risk=least,
        confidence=abstention.CONFIDENCE,
        classes_without_guarantee=[manifest.classes[label] for label in calibration.classes_without_guarantee(0.9)],
        novelty="features" if record and record.novelty else "predictive_entropy",
        cascade_groups=cascade.groups if cascade else None,
        cascade_disagreement=cascade.disagreement if cascade else None,
        reliability=[
            ReliabilityBin(confidence=sure, accuracy=right, images=images)
            for sure, right, images in calibration.reliability()
        ],
        note=f"{calibration.images} calibration images are too few for:  {', '.join(missing)}" if missing else None,
    )
