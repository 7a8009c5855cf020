"""Rows of many requests run together in batches, fairly, and only as many may wait as can be answered in time.

No request waits for a batch to fill. A batch takes half of the waiting rows: while one half runs, the answers to the
other half are written, and the next requests are read. The tasks of a batch are spread over the worker's threads. A
thread that finds no task left starts the next batch, so no core waits for another. The number of rows of a batch follows
from the measured time per row.

Requests take turns. A turn lasts as long as its rows need, up to a tenth of the time that a request may wait; a longer
request has several. A turn runs in pieces of at most one batch, and each piece has a time at which it is due: SLOWDOWN
times what the turn needs up to there, but at most a turn, counted from the begin of the turn. What is due first runs first. So a small
request passes between the pieces of a large one, and a request of one turn, once it is late, is not overtaken again.

A short request that is the only one is run at once on the event loop: the two hand-offs to a thread and back would take longer.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from models_store.graphs.runtime import Outputs
from service.http.errors import BrokenEnsembleError, QueueFullError, QueueTimeError
from service.inference.pieces import Answer, Batch, Job, Piece, Result, Segment, answer_of, checked
from service.inference.session import Rows, Session

log = logging.getLogger("bentoml.modepath")
SMOOTHING = 0.2  # weight of the newest batch in the moving average of the time per row
TURN = 0.1  # longest turn of a request, as a share of the time that a request may wait
AT_ONCE_SECONDS = 1e-3  # most of the event loop's time that a request may take
SLOWDOWN = 3  # a turn may take this many times the time that its rows need, before later requests have to wait for it


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Limits of one worker's queue and of its batches."""

    batch_rows: int  # rows that run together
    batch_seconds: float  # time that a batch should take
    rows: int  # rows that may wait
    seconds: float  # time that a request may wait


class Batcher:
    """The queue of one worker, and the threads that process it."""

    def __init__(self, limits: QueueLimits, threads: int):
        self._limits = limits
        self._threads = threads
        # Guards the fields below.
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, Job | Piece]] = []  # a heap: when it is due, its number, what waits
        self._numbers = itertools.count()
        self._open: Batch | None = None  # batch that still has tasks to start
        self._rows = 0  # rows of all requests that are not answered yet
        self._seconds = 0.0  # estimated time that a new request would wait
        self._row_seconds: WeakKeyDictionary[Session, float] = WeakKeyDictionary()
        self._closed = False
        self._since: dict[int, float] = {}  # start of the current task, by thread
        for number in range(threads):
            threading.Thread(target=self._work, name=f"batches-{number}", daemon=True).start()

    async def run(self, session: Session, rows: Rows, *, alone: bool = False) -> Answer:
        """Queue the rows of a request and return its answer.

        Args:
            session: what runs them.
            rows: of the request.
            alone: whether the process has no other request, and this one may hold up the event loop for a moment.

        Raises:
            QueueFullError: more rows are waiting than the limits allow, or than can be answered in time.
            QueueTimeError: the request's turn did not come in time.
            BrokenEnsembleError: a member failed or returned NaN.
        """
        if alone and self._is_short(session, len(rows)):
            return self._at_once(session, rows)
        job = Job(session, rows, asyncio.get_running_loop().create_future())
        with self._changed:
            self._admit(job)
            self._queue(job)
            self._changed.notify_all()
        try:
            return await job.future
        except asyncio.CancelledError:  # the client disconnected, or the request timed out
            self._withdraw(job)
            raise

    def _is_short(self, session: Session, rows: int) -> bool:
        if self._rows or self._open is not None or (row_seconds := self._row_seconds.get(session)) is None:
            return False
        # The estimate is of a batch whose tasks share the threads.
        return row_seconds * rows * min(self._threads, session.tasks(rows)) <= AT_ONCE_SECONDS

    def _at_once(self, session: Session, rows: Rows) -> Answer:
        here = threading.get_ident()
        self._since[here] = time.monotonic()
        began = time.perf_counter()
        try:
            outputs = [session.run(task, rows) for task in range(session.tasks(len(rows)))]
            settled = session.settle(rows, session.joined(outputs))
        except Exception as error:
            raise _member_failed(error) from None
        finally:
            del self._since[here]
        seconds = time.perf_counter() - began
        with self._changed:
            self._learn(session, seconds / min(self._threads, len(outputs)) / len(rows))
        return checked(Answer(settled.member_probs, settled.prediction, 0.0, seconds))

    def warm(self, session: Session, row: Rows) -> None:
        """Run one row and the largest batch, so that no client waits for allocations, and measure the time per row."""
        self._run_alone(session, row)  # not measured: the first run loads libraries and selects algorithms
        spent = self._run_alone(session, row)
        with self._changed:
            self._learn(session, spent)
            count = self._batch_rows(session)
        self._run_alone(session, Rows.joined([row] * count))

    def _run_alone(self, session: Session, rows: Rows) -> float:
        began = time.perf_counter()
        tasks = session.tasks(len(rows))
        for task in range(tasks):
            session.run(task, rows)
        return (time.perf_counter() - began) / min(self._threads, tasks) / len(rows)

    def longest_seconds(self) -> float:
        """Return the time in seconds that the longest-running current task has taken so far."""
        return time.monotonic() - min(list(self._since.values()), default=time.monotonic())

    def close(self) -> None:
        """Let the threads end after their current tasks."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def refuse_if_full(self) -> None:
        """Refuse a request that would wait too long, before any work is spent on it.

        Raises:
            QueueFullError: it would wait longer than the limit.
        """
        if self._seconds > self._limits.seconds:
            raise self._full()

    def _admit(self, job: Job) -> None:
        # If no other request waits, a request of any size is accepted: its own limits were checked when it was decoded.
        if self._rows and (self._rows + len(job.rows) > self._limits.rows or self._seconds > self._limits.seconds):
            raise self._full()
        self._rows += len(job.rows)

    def _withdraw(self, job: Job) -> None:
        """Remove a request: its waiting rows will not run, and the results of its running rows are discarded."""
        with self._changed:
            self._leave(job)
            kept = [entry for entry in self._waiting if entry[2] is not job]
            if len(kept) < len(self._waiting):
                self._waiting = kept
                heapq.heapify(kept)
                self._seconds = self._seconds - job.turn_seconds if kept else 0.0

    def _queue(self, job: Job | Piece) -> None:
        """Let a request, or what is left of it, wait. A piece that was put together for a cascade has had its turn: it is due."""
        row_seconds, due = self._row_seconds.get(job.session, 0.0), 0.0
        if isinstance(job, Job):
            left = len(job.rows) - job.taken
            piece = min(left, self._batch_rows(job.session)) * row_seconds
            if job.turn_left <= 0:
                job.turn_left, job.due = self._limits.seconds * TURN, time.perf_counter()
            # A new request waits for the rest of the turn of each request before it.
            job.turn_seconds = min(left * row_seconds, max(piece, job.turn_left))
            job.turn_left -= piece
            # Never later than a turn: where a row takes long, it would otherwise be due after its time to wait.
            due = job.due = job.due + min(SLOWDOWN * piece, self._limits.seconds * TURN)
        else:
            job.turn_seconds = len(job.rows) * row_seconds
        self._push((due, next(self._numbers), job))

    def _push(self, entry: tuple[float, int, Job | Piece]) -> None:
        self._seconds += entry[2].turn_seconds
        heapq.heappush(self._waiting, entry)

    def _pop(self) -> tuple[float, int, Job | Piece]:
        entry = heapq.heappop(self._waiting)
        self._seconds = self._seconds - entry[2].turn_seconds if self._waiting else 0.0
        return entry

    def _full(self) -> QueueFullError:
        error = QueueFullError(
            f"{self._rows} images are waiting, and a new request would wait for about {self._seconds:.1f} s. Try again later, or send fewer images at a time."
        )
        error.retry_after = max(1, round(self._seconds))
        return error

    def _work(self) -> None:
        while True:
            try:
                if (task := self._next()) is None:
                    return
                self._since[threading.get_ident()] = time.monotonic()
                self._run(*task)
                del task  # otherwise an idle thread would keep the last ensemble in memory
            except Exception:  # an ended thread would not be replaced
                log.exception("a batch was lost")
            finally:
                self._since.pop(threading.get_ident(), None)

    def _run(self, batch: Batch, number: int) -> None:
        began = time.perf_counter()
        try:
            batch.results[number] = batch.session.run(number, batch.rows())
        except Exception as error:
            batch.error = error
        with self._changed:
            batch.seconds += time.perf_counter() - began
            batch.ended += 1
            ended = batch.ended == len(batch.results)
        if ended:
            self._finish(batch)

    def _next(self) -> tuple[Batch, int] | None:
        """Wait for a task that no thread has started, and return its batch and number; None after `close`."""
        with self._changed:
            while not self._closed:
                if self._open is None:
                    self._open = self._take()
                if (batch := self._open) is not None:
                    number = batch.begun
                    batch.begun += 1
                    if batch.begun == len(batch.results):
                        self._open = None
                    return batch, number
                self._changed.wait()
            return None

    def _take(self) -> Batch | None:
        """Build the next batch, or return None if no request waits.

        All its pieces are for the session of the first waiting request. In the order in which they are due, each
        request contributes as many rows as still fit.
        """
        now = time.perf_counter()
        pieces: list[Piece] = []
        passed: list[tuple[float, int, Job | Piece]] = []
        unfinished: list[Job | Piece] = []
        room = 0
        while self._waiting and (not pieces or room > 0):
            entry = self._pop()
            job = entry[2]
            if self._is_over(job, now):
                continue
            if not pieces:
                room = min(self._batch_rows(job.session), (self._rows + 1) // 2)
            elif job.session is not pieces[0].session:
                passed.append(entry)
                continue
            if isinstance(job, Piece):
                piece, rest = job.cut(room)
                if rest is not None:
                    unfinished.append(rest)
            else:
                if not job.taken:
                    job.began = now
                stop = min(job.taken + room, len(job.rows))
                numbers = np.arange(job.taken, stop)
                piece = Piece(job.session, job.rows[job.taken : stop], [Segment(job, numbers)])
                job.taken = stop
                if stop < len(job.rows):
                    unfinished.append(job)
            pieces.append(piece)
            room -= len(piece.rows)
        for entry in passed:
            self._push(entry)
        for job in unfinished:
            self._queue(job)
        if not pieces:
            return None
        session = pieces[0].session
        rows = sum(len(piece.rows) for piece in pieces)
        return Batch(session, pieces, [None] * session.tasks(rows))

    def _is_over(self, job: Job | Piece, now: float) -> bool:
        """Return whether nothing is left to run: the client has left, or the request has waited too long for its first turn."""
        if isinstance(job, Piece):
            return all(segment.job.left for segment in job.segments)
        if job.future.done():  # the request was cancelled
            self._leave(job)
            return True
        if not job.taken and now - job.arrived > self._limits.seconds:
            self._leave(job)
            job.tell(
                QueueTimeError(
                    f"The request waited {self._limits.seconds:g} s for its turn; the service is overloaded. Try again later."
                )
            )
            return True
        return False

    def _finish(self, batch: Batch) -> None:
        segments = batch.segments()
        try:
            if batch.error is not None:
                raise batch.error
            results = [result for result in batch.results if result is not None]
            self._deliver(batch.session, segments, batch.rows(), batch.session.joined(results))
            with self._changed:
                at_once = min(self._threads, len(batch.results))
                self._learn(batch.session, batch.seconds / at_once / len(batch))
        except Exception as error:
            if len(segments) == 1:
                self._fail(segments[0].job, error)
                return
            start = 0
            for segment in segments:  # run separately, so that one request cannot fail the others
                rows = batch.rows()[start : start + len(segment.numbers)]
                start += len(segment.numbers)
                try:
                    results = [batch.session.run(task, rows) for task in range(batch.session.tasks(len(rows)))]
                    self._deliver(batch.session, [segment], rows, batch.session.joined(results))
                except Exception as its_own:
                    self._fail(segment.job, its_own)

    def _deliver(self, session: Session, segments: list[Segment], rows: Rows, outputs: Outputs) -> None:
        settled = session.settle(rows, outputs)
        stays = None if settled.stays is None else settled.stays.tolist()
        waiting: list[Segment] = []
        done: list[tuple[Job, Result]] = []
        row = answered = 0  # of all rows, and of the rows that are answered
        for segment in segments:
            job, numbers, stop = segment.job, segment.numbers, row + len(segment.numbers)
            if stays is not None and True in (of_rows := stays[row:stop]):
                keep = np.array(of_rows)
                waiting.append(Segment(job, numbers[keep]))
                numbers = numbers[~keep]
            row, first = stop, answered
            answered += len(numbers)
            if len(numbers):
                probs = None if settled.member_probs is None else settled.member_probs[:, first:answered]
                done.append((job, Result(numbers, probs, settled.prediction.rows(first, answered), settled.used)))
        ended: list[Job] = []
        with self._changed:
            for job, result in done:
                job.results.append(result)
                job.answered += len(result.rows)
                if job.answered == len(job.rows) and not job.left:
                    self._leave(job)
                    ended.append(job)
            if waiting and settled.further is not None:
                self._queue(Piece(*settled.further, waiting))
                self._changed.notify_all()
        for job in ended:
            job.tell(answer_of(job))

    def _fail(self, job: Job, error: Exception) -> None:
        self._withdraw(job)
        job.tell(_member_failed(error))

    def _learn(self, session: Session, row_seconds: float) -> None:
        known = self._row_seconds.get(session, row_seconds)
        self._row_seconds[session] = known + SMOOTHING * (row_seconds - known)

    def _batch_rows(self, session: Session) -> int:
        known = self._row_seconds.get(session)
        fitting = int(self._limits.batch_seconds / known) if known else self._limits.batch_rows
        return max(1, min(fitting, self._limits.batch_rows))

    def _leave(self, job: Job) -> None:
        if job.left:  # several of its pieces may fail
            return
        job.left = True
        self._rows -= len(job.rows)


def _member_failed(error: Exception) -> BrokenEnsembleError:
    log.error("a member failed", exc_info=error)
    return BrokenEnsembleError(
        f"A member failed on these images: {type(error).__name__}. The service's log has the details."
    )
