"""What goes in and what comes out, field by field. A new response field is added here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 - pydantic reads typing's own only from Python 3.12 on

from models_store.manifest import Manifest, Scores
from service.inference.batching import Answer
from service.inference.policy import Mode, Policy

log = logging.getLogger("bentoml.modepath")


class Options(BaseModel):
    """What every request may say: fields of a JSON body, query parameters with an array or an image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ensemble: str | None = Field(
        default=None, max_length=64, description="which ensemble answers (default: the service's)"
    )
    mode: Mode | None = Field(
        default=None,
        description="average: all members together; random: a network of its own for each image; keyed: the same, but the same "
        "image gets the same network for a while (default: the first one that is open)",
    )
    members: bool = Field(default=False, description="also give each member's probabilities")


class PredictRequest(Options):
    """The JSON body of POST /predict: either `inputs` or `images`."""

    # Checked by images.py: pydantic would walk every pixel.
    inputs: list[Any] | None = Field(default=None, description="(batch, C, H, W), floats in [0, 1]")
    images: list[str] | None = Field(default=None, fail_fast=True, description="PNG or JPEG files in base64")


# The answer is made of plain dictionaries: it is written for every row of every request, and nobody parses it here.
class Uncertainty(TypedDict):
    """Entropies in nats; see models_store/uncertainty.py."""

    predictive_entropy: Annotated[float, Field(description="entropy of the averaged distribution: all uncertainty")]
    expected_entropy: Annotated[
        float, Field(description="mean of the members' entropies: what each is unsure of by itself")
    ]
    mutual_information: Annotated[float, Field(description="their difference: what the members disagree on")]
    disagreement: Annotated[float, Field(description="share of members whose top class is not the ensemble's")]


class RowPrediction(TypedDict):
    """The answer for one image."""

    label: int
    class_name: str
    confidence: NotRequired[float]
    probs: NotRequired[Annotated[list[float], Field(description="rounded, or left out, as the operator has it")]]
    uncertainty: NotRequired[Annotated[Uncertainty, Field(description="only in `average`")]]
    point: NotRequired[Annotated[int, Field(description="which network answered; only where the operator shows it")]]
    members: NotRequired[Annotated[list[list[float]], Field(description="only when asked: (members, classes)")]]


class PredictResponse(TypedDict):
    """The answer to POST /predict."""

    ensemble: str
    version: int
    mode: Mode
    members_used: NotRequired[Annotated[int, Field(description="only in `average`")]]
    request_id: str
    predictions: list[RowPrediction]


class PoolInfo(BaseModel):
    """Single networks that are ready to answer, in each worker."""

    mebibytes: int = Field(
        description="of memory, about; where the ensemble is defended, what they may take at most, because what they take tells how many there are"
    )
    networks: int | None = Field(
        description="null where the ensemble is defended: how many there are helps an attacker"
    )
    of: int | None = Field(description="that the ensemble has; those that are not ready take turns")


class EnsembleInfo(BaseModel):
    """What a client may know of an ensemble: a whitelist. With seeds, commits or fingerprints training could be repeated."""

    name: str
    version: int
    method: str
    members: int | None = Field(description="null where the ensemble is defended")
    input_shape: tuple[int, int, int]
    resize: str
    classes: list[str]
    validation: Scores | None
    providers: list[str]
    modes: list[Mode]
    pool: PoolInfo | None
    default: bool


class EnsembleList(BaseModel):
    """The answer to GET /ensembles."""

    ensembles: list[EnsembleInfo]


class Status(BaseModel):
    """The answer of the probes."""

    status: str


class ErrorBody(BaseModel):
    """Every refusal."""

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
) -> PredictResponse:
    """Put arrays into the response: what the policy shows of them. `points` are the networks of the rows, where each has its own."""
    rows = _rows(manifest.classes, answer, policy.digits(mode))
    if mode != "average":
        if policy.point:
            for row, point in zip(rows, points, strict=True):
                row["point"] = point
        return {
            "ensemble": manifest.name, "version": manifest.version, "mode": mode, "request_id": request_id, "predictions": rows,
        }  # fmt: skip
    if policy.shows_uncertainty:
        prediction = answer.prediction
        for row, predictive_entropy, expected_entropy, mutual_information, disagreement in zip(
            rows, prediction.predictive_entropy.tolist(), prediction.expected_entropy.tolist(),
            prediction.mutual_information.tolist(), prediction.disagreement.tolist(), strict=True,
        ):  # fmt: skip
            row["uncertainty"] = {
                "predictive_entropy": predictive_entropy,
                "expected_entropy": expected_entropy,
                "mutual_information": mutual_information,
                "disagreement": disagreement,
            }
    if members:
        for row, probs in zip(rows, answer.member_probs.transpose(1, 0, 2).tolist(), strict=True):
            row["members"] = probs
    return {
        "ensemble": manifest.name,
        "version": manifest.version,
        "mode": mode,
        "members_used": len(manifest.members),
        "request_id": request_id,
        "predictions": rows,
    }


def _rows(classes: list[str], answer: Answer, digits: Literal["exact", "none"] | int) -> list[RowPrediction]:
    labels: list[int] = answer.prediction.label.tolist()
    if digits == "none":
        return [{"label": label, "class_name": classes[label]} for label in labels]
    probs, confidence = answer.prediction.mean_probs, answer.prediction.confidence
    if digits != "exact":
        probs, confidence = probs.round(digits), confidence.round(digits)
    return [
        {"label": label, "class_name": classes[label], "confidence": sure, "probs": one}
        for label, sure, one in zip(labels, confidence.tolist(), probs.tolist(), strict=True)
    ]


def padded(reply: bytes, manifest: Manifest, policy: Policy, mode: Mode, rows: int) -> bytes:
    """The answer followed by blanks, so that its length does not depend on what is in it.

    The length is an upper bound of what respond can write; a longer answer is filled up to whole kilobytes, and logged.
    """
    digits = policy.digits(mode)
    number = {"none": 0, "exact": 25}.get(str(digits)) if isinstance(digits, str) else digits + 4  # with its comma
    name = max(len(orjson.dumps(one)) for one in manifest.classes)
    row = 100 + name + (len(manifest.classes) + 1) * (number or 0)
    length = 200 + len(manifest.name) + rows * row
    if len(reply) > length:
        log.error(
            "An answer of %s has %d bytes where at most %d were expected: its length may tell what is in it. Report this, please.",
            manifest.name, len(reply), length,
        )  # fmt: skip
        length = -(-len(reply) // 1024) * 1024
    return reply.ljust(length)


def describe(
    manifest: Manifest, providers: list[str], policy: Policy, pool: PoolInfo | None, *, is_default: bool
) -> EnsembleInfo:
    """What `/ensembles` shows."""
    return EnsembleInfo(
        name=manifest.name,
        version=manifest.version,
        method=manifest.method,
        members=None if policy.defended else len(manifest.members),
        input_shape=manifest.input.shape,
        resize=manifest.input.resize,
        classes=manifest.classes,
        validation=manifest.validation,
        providers=providers,
        modes=list(policy.modes),
        pool=pool,
        default=is_default,
    )
