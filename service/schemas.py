"""What goes in and what comes out, field by field. A new response field is added here and nowhere else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models_store.manifest import Manifest, Scores
from models_store.uncertainty import Floats, Prediction


class PredictRequest(BaseModel):
    """The JSON body of POST /predict."""

    model_config = ConfigDict(extra="forbid")

    # Checked by images.as_images: pydantic would walk every pixel.
    inputs: list[Any] = Field(description="(batch, C, H, W), floats in [0, 1]")
    ensemble: str | None = Field(
        default=None, max_length=64, description="which ensemble answers (default: the service's)"
    )
    mode: Literal["average"] = Field(default="average", description="how the members answer")
    members: bool = Field(default=False, strict=True, description="also give each member's probabilities")


class Uncertainty(BaseModel):
    """Entropies in nats; see models_store/uncertainty.py."""

    predictive_entropy: float = Field(description="entropy of the averaged distribution: all uncertainty")
    expected_entropy: float = Field(description="mean of the members' entropies: what each is unsure of by itself")
    mutual_information: float = Field(description="their difference: what the members disagree on")
    disagreement: float = Field(description="share of members whose top class is not the ensemble's")


class RowPrediction(BaseModel):
    """The answer for one image."""

    label: int
    class_name: str
    confidence: float
    probs: list[float]
    uncertainty: Uncertainty
    members: list[list[float]] | None = Field(default=None, description="only when asked: (members, classes)")


class PredictResponse(BaseModel):
    """The answer to POST /predict."""

    ensemble: str
    version: int
    mode: str
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


class ErrorBody(BaseModel):
    """Every refusal."""

    error: str = Field(description="what was wrong, the likely cause, and what to do")


def respond(
    manifest: Manifest, request_id: str, mode: str, prediction: Prediction, member_probs: Floats | None
) -> PredictResponse:
    """Put arrays into the response. `member_probs` is (members, batch, classes), or None when not asked for."""
    rows = [
        RowPrediction(
            label=label,
            class_name=manifest.classes[label],
            confidence=float(prediction.confidence[i]),
            probs=prediction.mean_probs[i].tolist(),
            uncertainty=Uncertainty(
                **{measure: float(getattr(prediction, measure)[i]) for measure in Uncertainty.model_fields}
            ),
            members=None if member_probs is None else member_probs[:, i].tolist(),
        )
        for i, label in enumerate(map(int, prediction.label))
    ]
    return PredictResponse(
        ensemble=manifest.name,
        version=manifest.version,
        mode=mode,
        members_used=len(manifest.members),
        request_id=request_id,
        predictions=rows,
    )


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
