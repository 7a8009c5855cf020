"""Decisions about single answers: prediction sets, abstention and novelty, from the calibration of the version.

What a request may ask for depends on the version (is it calibrated, on how many images?) and on the policy: a set whose
coverage the client chooses reveals probabilities, so it needs a policy that shows them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models_store.decisions import abstention
from models_store.decisions.calibration import (
    Calibration,
    Decision,
    Reason,
    Way,
    by_probability,
    decide,
    load_calibrations,
    uniform,
)
from models_store.decisions.conformal import Method
from models_store.errors import MemberError
from models_store.store import Version
from models_store.uncertainty import UNCERTAINTY_MEASURES, Floats, Prediction
from service.http.errors import BadRequestError, ForbiddenError
from service.http.images import Images
from service.inference.policy import Mode, Policy

HOW = "Calibrate it: python -m models_store calibrate {} --dataset SOURCE."


class Wanted(Protocol):
    """The fields of a request that concern decisions; see schemas.Options."""

    coverage: float | None
    set_method: Method | None
    per_class: bool
    allow_empty: bool
    risk: float | None
    wrong_cost: float | None
    review_cost: float | None
    percentiles: bool


@dataclass(frozen=True, slots=True)
class Decided:
    """The decisions for the rows of one request. A field is None if it was not asked for, or is not shown."""

    sets: list[list[int]] | None = None
    decisions: list[tuple[Decision, Reason | None]] | None = None
    novelty: tuple[Floats, Floats] | None = None  # score and percentile, (batch,) each
    percentiles: dict[str, Floats] | None = None  # by measure, (batch,) each


NOTHING = Decided()


class Decisions:
    """The decisions of one ensemble."""

    def __init__(self, name: str, ways: Mapping[Way, Calibration], policy: Policy, *, draws_all: bool = True):
        """Create the decisions of an ensemble; `draws_all` is False if `keyed` draws from a part of the networks only."""
        self._name, self._ways, self._policy, self._draws_all = name, ways, policy, draws_all

    @classmethod
    def of(cls, version: Version, policy: Policy, *, draws_all: bool = True) -> Decisions:
        """Return the decisions of a version; of one without a calibration, only those that need none.

        Raises:
            CorruptionError: its calibration cannot be read.
        """
        ways = load_calibrations(version.folder, version.manifest)
        return cls(version.manifest.name, ways, policy, draws_all=draws_all)

    def calibration(self, mode: Mode) -> Calibration | None:
        """Return the calibration for a mode; None if there is none."""
        if mode == "cascade":  # its margins were chosen with the calibration images
            return None
        if mode == "keyed" and not self._draws_all:  # the calibration is that of all networks
            return None
        return self._ways.get("average" if mode == "average" else "drawn")

    def check(self, mode: Mode, wanted: Wanted) -> None:
        """Refuse a request whose decisions cannot be made.

        Raises:
            BadRequestError: its fields contradict each other, or the calibration does not support them.
            ForbiddenError: the policy hides what the decisions would reveal.
        """
        if wanted.coverage is None and (wanted.set_method or wanted.per_class or wanted.allow_empty):
            raise BadRequestError(
                "set_method, per_class and allow_empty describe a prediction set: give its `coverage`, for example 0.9."
            )
        if (wanted.wrong_cost is None) != (wanted.review_cost is None):
            raise BadRequestError("A decision by cost needs both `wrong_cost` and `review_cost`.")
        if wanted.wrong_cost is not None and wanted.review_cost is not None and wanted.review_cost >= wanted.wrong_cost:
            raise BadRequestError(
                f"A review costs {wanted.review_cost:g} and a wrong answer {wanted.wrong_cost:g}: then every answer is given. `review_cost` must be smaller than `wrong_cost`."
            )
        if wanted.wrong_cost is not None and (wanted.risk is not None or self._policy.risk is not None):
            raise BadRequestError(
                "A decision is made by `risk` or by `wrong_cost` and `review_cost`, not by both. The operator's policy may name a risk."
            )
        if not (wanted.coverage or wanted.risk or wanted.wrong_cost or wanted.percentiles):
            return
        if mode == "cascade":
            raise BadRequestError(
                "Prediction sets, decisions and percentiles are calibrated for all members together: ask for them in mode 'average'."
            )
        if self._policy.digits(mode) != "exact":
            raise ForbiddenError(
                f"The operator does not show exact probabilities of {self._name} in {mode!r}, and prediction sets and decisions by the client's own limits would reveal them."
            )
        if wanted.percentiles and mode == "average" and not self._policy.shows_uncertainty:
            raise ForbiddenError(
                f"The operator does not show the uncertainty of {self._name}, and its percentiles would reveal it."
            )
        calibration = self.calibration(mode)
        if calibration is None:
            raise BadRequestError(
                f"{self._name} is not calibrated for {mode!r}, so it gives no prediction sets and decisions. {HOW.format(self._name)}"
            )
        if wanted.coverage is not None and wanted.coverage > calibration.most_coverage:
            raise BadRequestError(
                f"{calibration.images} calibration images guarantee a coverage of at most {calibration.most_coverage:.4g}, not {wanted.coverage:g}. "
                "Ask for less, or calibrate on more images."
            )
        if wanted.risk is not None and calibration.threshold(wanted.risk) is None:
            raise BadRequestError(
                f"{self._cannot(wanted.risk, calibration)} Ask for a higher risk, or calibrate on more images."
            )

    def check_policy(self, mode: Mode) -> None:
        """Refuse a version that cannot keep the risk that the operator's policy names.

        Raises:
            MemberError: it is not calibrated for this mode, or on too few images.
        """
        if (risk := self._policy.risk) is None:
            return
        if (calibration := self.calibration(mode)) is None:
            raise MemberError(
                f"The policy limits the risk of {self._name}, which is not calibrated for {mode!r}. {HOW.format(self._name)}"
            )
        if calibration.threshold(risk) is None:
            raise MemberError(
                f"The policy limits the risk. {self._cannot(risk, calibration)} Calibrate it on more images, or name a higher risk in the policy."
            )

    def _cannot(self, risk: float, calibration: Calibration) -> str:
        least = f"the smallest is {calibration.least_risk:g}" if calibration.least_risk else "none can be guaranteed"
        return f"No confidence of {self._name} guarantees a risk of {risk:g} on {calibration.images} calibration images; {least}."

    def decide(self, mode: Mode, wanted: Wanted, images: Images, prediction: Prediction) -> Decided:
        """Decide about the rows of a request that passed `check`."""
        if (calibration := self.calibration(mode)) is None:  # then `check` lets pass only what asks for nothing
            return NOTHING
        sets = decisions = percentiles = None
        if wanted.coverage is not None:
            method = wanted.set_method or "lac"
            u = uniform(images) if method != "lac" else np.zeros(len(images))
            chosen = calibration.sets(
                prediction.mean_probs,
                wanted.coverage,
                method,
                u,
                per_class=wanted.per_class,
                allow_empty=wanted.allow_empty,
            )
            sets = by_probability(chosen, prediction.mean_probs)
        if (limit := self._limit(calibration, wanted)) is not None:
            decisions = decide(prediction, limit, calibration)
        if wanted.percentiles:
            percentiles = {
                name: calibration.percentile(name, getattr(prediction, name)) for name in UNCERTAINTY_MEASURES
            }
        shown = self._policy.digits(mode) == "exact" and (mode != "average" or self._policy.shows_uncertainty)
        novelty = (prediction.novelty, calibration.novelty_percentile(prediction.novelty)) if shown else None
        return Decided(sets, decisions, novelty, percentiles)

    def _limit(self, calibration: Calibration, wanted: Wanted) -> float | None:
        if wanted.wrong_cost is not None and wanted.review_cost is not None:
            return abstention.least_confidence(wanted.wrong_cost, wanted.review_cost)
        risks = [risk for risk in (wanted.risk, self._policy.risk) if risk is not None]
        if not risks:
            return None
        threshold = calibration.threshold(min(risks))
        assert threshold is not None, "`check` has refused the request"
        return threshold.confidence
