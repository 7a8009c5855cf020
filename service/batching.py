"""Rows of many requests run together, fairly, and only as many wait as can be answered in time.

One thread of a worker runs one batch after the other; what arrives meanwhile is the next batch, so nobody waits for a
batch to fill. Requests take turns: a large one runs in pieces, and small ones pass between them. How many rows make a
batch follows from how long a row of that ensemble takes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from models_store.uncertainty import Floats, Prediction
from service.errors import BrokenEnsembleError, QueueFullError, QueueTimeError, ServiceError
from service.images import Images

log = logging.getLogger("bentoml.modepath")
SMOOTHING = 0.2  # weight of the newest batch in the mean time of a row


class Session(Protocol):
    """What is run: models_store.runtime.EnsembleSession."""

    def member_probs(self, images: Images) -> Floats:
        """(batch, C, H, W) -> (members, batch, classes)."""
        ...

    def combine(self, member_probs: Floats) -> Prediction:
        """(members, batch, classes) -> the answers."""
        ...


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one worker's queue and of its batches."""

    batch_rows: int
    batch_seconds: float
    rows: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out for one request, and where its time went."""

    member_probs: Floats
    prediction: Prediction
    queue_seconds: float
    members_seconds: float


class _Job:
    """One request: its rows, and how many of them have run."""

    __slots__ = ("arrived", "collected", "done", "future", "images", "loop", "session", "started")

    def __init__(self, session: Session, images: Images, loop: asyncio.AbstractEventLoop):
        self.session = session
        self.images = images
        self.loop = loop
        self.future: asyncio.Future[Answer] = loop.create_future()
        self.arrived = time.perf_counter()
        self.started: float | None = None
        self.done = 0
        self.collected: list[Floats] = []


class Batcher:
    """The queue of one worker and the thread that empties it."""

    def __init__(self, limits: QueueLimits):
        self._limits = limits
        self._arrived: SimpleQueue[_Job | None] = SimpleQueue()  # None: end
        self._waiting: deque[_Job] = deque()  # what has arrived; only the thread looks at it
        self._counts = threading.Lock()  # of the two numbers below
        self._rows = 0
        self._bytes = 0
        self._row_seconds: WeakKeyDictionary[Session, float] = WeakKeyDictionary()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    async def run(self, session: Session, images: Images) -> Answer:
        """Wait for the rows' turn and for their answers.

        Raises:
            QueueFullError: more rows or bytes wait than the limits allow, or than can be answered in time.
            QueueTimeError: its turn did not come in time.
            BrokenEnsembleError: a member failed or gave NaN.
        """
        job = _Job(session, images, asyncio.get_running_loop())
        with self._counts:
            self._admit(job)
        self._arrived.put(job)
        return await job.future

    def warm(self, session: Session, images: Images) -> None:
        """Run the largest batch there may be, so that no client waits for allocations, and learn how long a row takes."""
        self._timed(session, images)
        self._timed(session, np.repeat(images, self._batch_rows(session), axis=0))

    def close(self) -> None:
        """Let the thread end after its batch."""
        self._arrived.put(None)

    def _admit(self, job: _Job) -> None:
        rows = self._rows
        wait = rows * self._row_seconds.get(job.session, 0.0)
        # Whoever finds nobody waiting is taken, whatever its size: its own limits were checked when it was decoded.
        if rows and (
            rows + len(job.images) > self._limits.rows
            or self._bytes + job.images.nbytes > self._limits.bytes
            or wait > self._limits.seconds
        ):
            error = QueueFullError(
                f"{rows} images wait, about {wait:.1f} s of work; no more are taken. Try again after a second, or send fewer at a time."
            )
            error.retry_after = max(1, round(wait))
            raise error
        self._rows += len(job.images)
        self._bytes += job.images.nbytes

    def _work(self) -> None:
        while self._receive():
            if pieces := self._take():
                self._run(pieces)

    def _receive(self) -> bool:
        """Let in who has arrived, waiting for somebody where nobody waits. False: it is the end."""
        while not self._waiting or not self._arrived.empty():
            if (job := self._arrived.get()) is None:
                return False
            self._waiting.append(job)
        return True

    def _take(self) -> list[tuple[_Job, int]]:
        """The next batch: (job, number of its rows), of one ensemble, those in front first."""
        now = time.perf_counter()
        pieces: list[tuple[_Job, int]] = []
        passed: list[_Job] = []
        room = 0
        while self._waiting and (not pieces or room):
            job = self._waiting.popleft()
            if job.started is None and now - job.arrived > self._limits.seconds:
                self._leave(job)
                _tell(
                    job,
                    QueueTimeError(
                        f"No answer within {self._limits.seconds:g} s of waiting: too much to do. Try again."
                    ),
                )
            elif not pieces or job.session is pieces[0][0].session:
                if not pieces:
                    room = self._batch_rows(job.session)
                count = min(room, len(job.images) - job.done)
                room -= count
                pieces.append((job, count))
            else:
                passed.append(job)
        self._waiting.extendleft(reversed(passed))
        return pieces

    def _run(self, pieces: list[tuple[_Job, int]]) -> None:
        session = pieces[0][0].session
        started = time.perf_counter()
        for job, _ in pieces:
            job.started = job.started or started
        rows = [job.images[job.done : job.done + count] for job, count in pieces]
        try:
            member_probs = self._timed(session, rows[0] if len(rows) == 1 else np.concatenate(rows))
        except Exception as error:
            if len(pieces) > 1:  # one of them must not cost the others their answers
                for piece in pieces:
                    self._run([piece])
                return
            log.exception("a member failed")
            self._leave(pieces[0][0])
            _tell(
                pieces[0][0],
                BrokenEnsembleError(f"A member failed on these images: {type(error).__name__}. The log says more."),
            )
            return
        first = 0
        for job, count in pieces:
            job.collected.append(member_probs[:, first : first + count])
            job.done += count
            first += count
        finished = [job for job, _ in pieces if job.done == len(job.images)]
        self._waiting.extend(job for job, _ in pieces if job.done < len(job.images))
        for job in finished:
            self._leave(job)
            _tell(job, _answer(job))

    def _timed(self, session: Session, images: Images) -> Floats:
        started = time.perf_counter()
        member_probs = session.member_probs(images)
        spent = (time.perf_counter() - started) / len(images)
        known = self._row_seconds.get(session, spent)
        self._row_seconds[session] = known + SMOOTHING * (spent - known)
        return member_probs

    def _batch_rows(self, session: Session) -> int:
        known = self._row_seconds.get(session)
        fitting = int(self._limits.batch_seconds / known) if known else self._limits.batch_rows
        return max(1, min(fitting, self._limits.batch_rows))

    def _leave(self, job: _Job) -> None:
        with self._counts:
            self._rows -= len(job.images)
            self._bytes -= job.images.nbytes


def _answer(job: _Job) -> Answer | ServiceError:
    member_probs = job.collected[0] if len(job.collected) == 1 else np.concatenate(job.collected, axis=1)
    prediction = job.session.combine(member_probs)
    if not np.isfinite(prediction.mean_probs).all():
        return BrokenEnsembleError("The ensemble answers one of these images with NaN; it should not be served.")
    assert job.started is not None
    return Answer(member_probs, prediction, job.started - job.arrived, time.perf_counter() - job.started)


def _tell(job: _Job, outcome: Answer | ServiceError) -> None:
    def set_outcome() -> None:
        if job.future.done():  # its client gave up
            return
        if isinstance(outcome, Answer):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)

    job.loop.call_soon_threadsafe(set_outcome)
