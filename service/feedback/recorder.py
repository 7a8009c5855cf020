"""Writes answers to the database off the request path, and compares late labels with them.

Answers wait in a bounded queue for a thread. An answer never waits for a disk: if the database is slow or down, answers
are lost for feedback once the queue is full. They are counted, and the log says so.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from service.feedback.answers import Counted, Kept
from service.feedback.database import Classes, Database, Label, Outcome, made_after
from service.http.errors import FeedbackError

FLUSH_SECONDS = 1.0
MOST_TOGETHER = 2000  # answers of one transaction
MOST_WAITING = 20_000  # answers
MOST_BYTES = 64 * 2**20  # of answers that wait
PRUNE_SECONDS = 60
MOST_RETRY_SECONDS = 5.0
REPORT_THREADS, MOST_REPORTS = 2, 16  # reports that run, and that may wait or run
SETTLE_SECONDS = 10.0  # an answer that is younger may still be on its way to the database
log = logging.getLogger("bentoml.modepath")


class Counts(Protocol):
    """What the recorder reports to the metrics."""

    def lost(self, count: int) -> None:
        """Count answers that were not stored."""
        ...

    def scored(self, one: Counted) -> None:
        """Count a label that was accepted."""
        ...

    def rejected(self, reason: str) -> None:
        """Count a label that was rejected."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What the database may hold."""

    days: float
    bytes: int


class Recorder:
    """The feedback of one worker process."""

    def __init__(self, url: str, limits: Limits, counts: Counts):
        """Start the thread. It opens the database, and tries again for as long as that fails."""
        self._url, self._limits, self._counts = url, limits, counts
        # The thread looks at the queue every FLUSH_SECONDS. Waking it for each answer would delay the event loop, which needs
        # the interpreter's lock at that moment to send the answer.
        self._waiting: deque[Kept] = deque()
        self._held = 0  # bytes that wait, guarded by the lock
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._reports = 0  # that wait or run
        self._threads = ThreadPoolExecutor(
            REPORT_THREADS, "feedback-reports"
        )  # of their own: /metrics must not wait for them
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="feedback", daemon=True)
        self._thread.start()

    def keep(self, answer: Kept) -> None:
        """Queue an answer. Returns at once."""
        size = answer.held
        with self._lock:
            full = self._held + size > MOST_BYTES or len(self._waiting) >= MOST_WAITING
            self._held += 0 if full else size
        if full:
            self._counts.lost(1)
        else:
            self._waiting.append(answer)

    async def report(self, labels: Sequence[Label], classes: Classes) -> list[Outcome]:
        """Store and count labels.

        Args:
            labels: what a client reports.
            classes: (ensemble, version) -> its class names, for labels that are names.

        Raises:
            FeedbackError: the database cannot be reached, or too many reports wait for it.
        """
        outcomes = await self._once(labels, classes)
        since = time.time() - SETTLE_SECONDS
        early = [
            i for i, outcome in enumerate(outcomes) if outcome == "unknown" and made_after(labels[i].request_id, since)
        ]
        if early:  # this worker or another may be about to store these answers
            await asyncio.sleep(2 * FLUSH_SECONDS)
            for i, again in zip(early, await self._once([labels[i] for i in early], classes), strict=True):
                outcomes[i] = again
        for outcome in outcomes:
            if outcome != "accepted":
                self._counts.rejected(outcome)
        return outcomes

    async def _once(self, labels: Sequence[Label], classes: Classes) -> list[Outcome]:
        if self._reports >= MOST_REPORTS:
            raise FeedbackError("Too many reports wait for the database of answers. Try again later.")
        with self._lock:
            self._reports += 1
        # Counted when the thread ends, not when its request does: a thread that hangs is not free.
        work = self._threads.submit(self._report, labels, classes)
        work.add_done_callback(lambda _: self._ended())
        return await asyncio.wrap_future(work)

    def _ended(self) -> None:
        with self._lock:
            self._reports -= 1

    def _report(self, labels: Sequence[Label], classes: Classes) -> list[Outcome]:
        if (database := self._database) is None:
            raise FeedbackError(
                "The database of answers cannot be reached, so labels cannot be stored. The service's log says why. Try again later."
            )
        try:
            found = database.report(labels, classes, time.time() - self._limits.days * 86400)
        except SQLAlchemyError as error:
            self._fails(error)
            raise FeedbackError(
                f"The database of answers failed ({type(error).__name__}), so not all labels were stored. Try again later."
            ) from None
        for _, counted in found:
            if counted is not None:
                self._counts.scored(counted)
        return [outcome for outcome, _ in found]

    def close(self, seconds: float = 2.0) -> None:
        """Write what waits, for at most `seconds`, and end the thread."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._thread.join(seconds)

    def _work(self) -> None:
        pruned, pause, batch = 0.0, 0.0, list[Kept]()  # the first pause is short: the database is opened at once
        while True:
            ending = self._closed.wait(pause)
            while self._waiting and len(batch) < MOST_TOGETHER:
                batch.append(self._waiting.popleft())
            try:
                if self._database is None:
                    self._database = Database(self._url)
                if batch:
                    self._database.keep(batch)
                    self._let_go(batch)
                    batch = []
                if time.monotonic() - pruned > PRUNE_SECONDS:
                    self._database.prune(time.time() - self._limits.days * 86400, self._limits.bytes)
                    pruned = time.monotonic()
                self._works_again()
                pause = FLUSH_SECONDS
            except (DataError, IntegrityError) as error:  # it would refuse these answers again
                self._fails(error)
                self._counts.lost(len(batch))
                self._let_go(batch)
                batch = []
            except (SQLAlchemyError, OSError, ImportError) as error:
                self._fails(error)
                pause = min(max(2 * pause, FLUSH_SECONDS), MOST_RETRY_SECONDS)
                if ending:
                    break
            except Exception as error:  # nothing would restart this thread
                log.exception("answers cannot be kept")
                self._fails(error)
                self._counts.lost(len(batch))
                self._let_go(batch)
                batch = []
            if ending and not self._waiting and not batch:
                break
        self._counts.lost(len(batch) + len(self._waiting))
        if self._database is not None:
            self._database.close()

    def _let_go(self, batch: Sequence[Kept]) -> None:
        with self._lock:
            self._held -= sum(answer.held for answer in batch)

    def _fails(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.error(
                "The database of answers fails: %s. Requests are answered, but feedback about them is lost once %d answers wait.",
                str(error).splitlines()[0], MOST_WAITING,
            )  # fmt: skip

    def _works_again(self) -> None:
        if self._failing:
            self._failing = False
            log.info("the database of answers works again")
