"""What an answer shows of a batch, field by field: the policy is applied here, once, for every protocol.

`schemas.respond` writes the columns row by row as JSON, and service/oip as tensors. A new field of a prediction is added
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models_store.uncertainty import Floats
from service.inference.decisions import NOTHING, Decided
from service.inference.pieces import Answer
from service.inference.policy import TOGETHER, Mode, Policy

# One value for each row, or fields within a field.
Column = NDArray[Any] | list[Any] | dict[str, Floats]
Columns = dict[str, Column]


def shown(
    classes: Sequence[str],
    mode: Mode,
    answer: Answer,
    policy: Policy,
    *,
    members: bool,
    points: Sequence[int] = (),
    decided: Decided = NOTHING,
) -> Columns:
    """Return the fields of an answer that the policy shows, in the order of the response.

    Args:
        classes: names of the classes.
        mode: which answered.
        answer: of the queue.
        policy: of the ensemble.
        members: whether each member's probabilities were asked for.
        points: the numbers of the networks that answered, one per row, in modes where a network is drawn for each row.
        decided: decisions for the rows.

    Returns:
        Arrays, (batch, …), or lists of `batch` values where numbers do not suffice.
    """
    prediction, digits = answer.prediction, policy.digits(mode)
    found: Columns = {
        "label": prediction.label,
        "class_name": [classes[label] for label in prediction.label.tolist()],
    }
    if digits != "none":
        exact = digits == "exact"
        found["confidence"] = prediction.confidence if exact else prediction.confidence.round(digits)
        found["probs"] = prediction.mean_probs if exact else prediction.mean_probs.round(digits)
    if decided.novelty is not None:
        found["novelty"] = dict(zip(("score", "percentile"), decided.novelty, strict=True))
    if decided.percentiles is not None:
        found["percentiles"] = decided.percentiles
    if decided.sets is not None:
        found["prediction_set"] = decided.sets
    if decided.decisions is not None:
        found["decision"] = [decision for decision, _ in decided.decisions]
        found["reason"] = [reason for _, reason in decided.decisions]
    if mode not in TOGETHER:
        if policy.point:
            found["point"] = list(points)
        return found
    if policy.shows_uncertainty:
        found["uncertainty"] = {
            "predictive_entropy": prediction.predictive_entropy,
            "expected_entropy": prediction.expected_entropy,
            "mutual_information": prediction.mutual_information,
            "disagreement": prediction.disagreement,
        }
    if answer.used is not None:
        found["members_used"] = answer.used
    elif members and answer.member_probs is not None:
        found["members"] = answer.member_probs.transpose(1, 0, 2)  # (batch, members, classes)
    return found


def by_row(columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Return the columns as one object for each row, with Python's own numbers."""
    values = (
        by_row(column) if isinstance(column, dict) else column.tolist() if isinstance(column, np.ndarray) else column
        for column in columns.values()
    )
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
