"""What waits in the queue and runs in batches: requests, pieces of them, and the answers that are put together again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models_store.graphs.runtime import Outputs
from models_store.uncertainty import Floats, Prediction
from service.http.errors import BrokenEnsembleError, ServiceError
from service.inference.session import Rows, Session


@dataclass(frozen=True, slots=True)
class Answer:
    """The result for one request, and how its time was spent."""

    member_probs: Floats | None  # (members, batch, classes); None in a cascade
    prediction: Prediction
    queue_seconds: float
    members_seconds: float
    used: NDArray[np.intp] | None = None  # (batch,): members that ran for each row, in a cascade


@dataclass(slots=True, eq=False)
class Result:
    """Answers for some rows of a request."""

    rows: NDArray[np.intp]
    member_probs: Floats | None
    prediction: Prediction
    used: int


def _no_results() -> list[Result]:
    return []  # `list[Result]()` takes as long as all other fields of a request together


@dataclass(slots=True, eq=False)
class Job:
    """One request: its rows, how many of them are in batches already, and the results so far."""

    session: Session
    rows: Rows
    future: asyncio.Future[Answer]
    arrived: float = field(default_factory=time.perf_counter)
    began: float = 0.0
    taken: int = 0
    answered: int = 0
    left: bool = False
    turn_left: float = 0.0  # time that is left of its turn
    turn_seconds: float = 0.0  # estimated time that it still takes in this turn
    due: float = 0.0  # when its next piece should have run
    results: list[Result] = field(default_factory=_no_results)

    def tell(self, outcome: Answer | ServiceError) -> None:
        """Deliver the outcome to the waiting request; may be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the service is shutting down, and its loop is closed
            self.future.get_loop().call_soon_threadsafe(self._set, outcome)

    def _set(self, outcome: Answer | ServiceError) -> None:
        if self.future.done():  # the request was cancelled
            return
        if isinstance(outcome, Answer):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a piece that belong to one request."""

    job: Job
    numbers: NDArray[np.intp]  # of the rows in the request


@dataclass(slots=True, eq=False)
class Piece:
    """Rows that run together: some of one request, or in a cascade those of several requests that need the next group."""

    session: Session
    rows: Rows
    segments: list[Segment]
    turn_seconds: float = 0.0  # estimated time, while it waits

    def cut(self, count: int) -> tuple[Piece, Piece | None]:
        """Return the first `count` rows, and the rest if there is one."""
        if count >= len(self.rows):
            return self, None
        first: list[Segment] = []
        second: list[Segment] = []
        left = count
        for segment in self.segments:
            size = len(segment.numbers)
            if left > 0:
                first.append(Segment(segment.job, segment.numbers[:left]))
            if size > left:
                second.append(Segment(segment.job, segment.numbers[max(left, 0) :]))
            left -= size
        return Piece(self.session, self.rows[:count], first), Piece(self.session, self.rows[count:], second)


@dataclass(slots=True, eq=False)
class Batch:
    """Pieces for one session that run together, and the progress of their tasks."""

    session: Session
    pieces: list[Piece]
    results: list[Outputs | None]  # one per task
    joined: Rows | None = None
    begun: int = 0  # tasks started
    ended: int = 0  # tasks finished
    seconds: float = 0.0  # total time of all tasks
    error: Exception | None = None

    def rows(self) -> Rows:
        """Return all rows. They are joined only when a thread needs them, because then the queue is not locked."""
        if self.joined is None:
            self.joined = Rows.joined([piece.rows for piece in self.pieces])
        return self.joined

    def __len__(self) -> int:
        return sum(len(piece.rows) for piece in self.pieces)

    def segments(self) -> list[Segment]:
        """Return the segments of all pieces, in the order of their rows."""
        return [segment for piece in self.pieces for segment in piece.segments]


def answer_of(job: Job) -> Answer | ServiceError:
    """Join the results of a request, in the order of its rows; an error if one of them is NaN."""
    results = [result for result in job.results if len(result.rows)]
    member_probs, prediction = results[0].member_probs, results[0].prediction
    cascaded = member_probs is None
    used = np.concatenate([np.full(len(result.rows), result.used) for result in results]) if cascaded else None
    if len(results) > 1:
        order = np.argsort(np.concatenate([result.rows for result in results]))
        prediction = Prediction.joined([result.prediction for result in results]).take(order)
        used = None if used is None else used[order]
        if not cascaded:
            member_probs = np.concatenate([r.member_probs for r in results if r.member_probs is not None], axis=1)[
                :, order
            ]
    try:
        return checked(Answer(member_probs, prediction, job.began - job.arrived, time.perf_counter() - job.began, used))
    except BrokenEnsembleError as error:
        return error


def checked(answer: Answer) -> Answer:
    """Return the answer.

    Raises:
        BrokenEnsembleError: one of its rows is NaN.
    """
    if not np.isfinite(answer.prediction.mean_probs).all():
        raise BrokenEnsembleError("The ensemble answers one of these images with NaN; it should not be served.")
    return answer
