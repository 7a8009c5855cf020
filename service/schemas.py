"""What goes in and what comes out, field by field. A new response field is added here and nowhere else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 - pydantic reads typing's own only from Python 3.12 on

from models_store.manifest import Manifest, Scores
from models_store.uncertainty import Floats, Prediction

Mode = Literal["average"]


class Options(BaseModel):
    """What every request may say: fields of a JSON body, query parameters beside an array or an image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ensemble: str | None = Field(
        default=None, max_length=64, description="which ensemble answers (default: the service's)"
    )
    mode: Mode = Field(default="average", description="how the members answer")
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
    confidence: float
    probs: list[float]
    uncertainty: Uncertainty
    members: NotRequired[Annotated[list[list[float]], Field(description="only when asked: (members, classes)")]]


class PredictResponse(TypedDict):
    """The answer to POST /predict."""

    ensemble: str
    version: int
    mode: Mode
    members_used: int
    request_id: str
    predictions: list[RowPrediction]


class EnsembleInfo(BaseModel):
    """What a client may know of an ensemble: a whitelist. With seeds, commits or fingerprints training could be repeated."""

    name: str
    version: int
    method: str
    members: int
    input_shape: tuple[int, int, int]
    resize: str
    classes: list[str]
    validation: Scores | None
    providers: list[str]
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
    manifest: Manifest, request_id: str, mode: Mode, prediction: Prediction, member_probs: Floats | None
) -> PredictResponse:
    """Put arrays into the response. `member_probs` is (members, batch, classes), or None when not asked for."""
    labels: list[int] = prediction.label.tolist()
    rows: list[RowPrediction] = [
        {
            "label": label,
            "class_name": manifest.classes[label],
            "confidence": confidence,
            "probs": probs,
            "uncertainty": {
                "predictive_entropy": predictive_entropy,
                "expected_entropy": expected_entropy,
                "mutual_information": mutual_information,
                "disagreement": disagreement,
            },
        }
        for (
            label, confidence, probs, predictive_entropy, expected_entropy, mutual_information, disagreement,
        ) in zip(
            labels, prediction.confidence.tolist(), prediction.mean_probs.tolist(),
            prediction.predictive_entropy.tolist(), prediction.expected_entropy.tolist(),
            prediction.mutual_information.tolist(), prediction.disagreement.tolist(), strict=True,
        )
    ]  # fmt: skip
    if member_probs is not None:
        for row, probs in zip(rows, member_probs.transpose(1, 0, 2).tolist(), strict=True):
            row["members"] = probs
    return {
        "ensemble": manifest.name,
        "version": manifest.version,
        "mode": mode,
        "members_used": len(manifest.members),
        "request_id": request_id,
        "predictions": rows,
    }


def describe(manifest: Manifest, providers: list[str], *, is_default: bool) -> EnsembleInfo:
    """What `/ensembles` shows."""
    return EnsembleInfo(
        name=manifest.name,
        version=manifest.version,
        method=manifest.method,
        members=len(manifest.members),
        input_shape=manifest.input.shape,
        resize=manifest.input.resize,
        classes=manifest.classes,
        validation=manifest.validation,
        providers=providers,
        default=is_default,
    )
