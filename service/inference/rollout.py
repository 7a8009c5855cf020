"""Canaries: a new version answers a share of the callers beside the active one, is compared with it, and is rolled back.

A caller sees one version: a hash of its name decides. Where a canary fails on a request, the active version answers it.
Comparisons run after the answers, in a thread of the lowest priority, and are left out where it does not keep up. The
numbers that the operator's rule judges are those of all workers; the first worker that finds a limit exceeded ends the
roll-out for all of them at once, and records that in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from typing import Literal, Protocol, TypeVar

import numpy as np

from models_store.errors import StoreError
from models_store.records.rollout import RollOut, Rule
from models_store.store import Store
from models_store.uncertainty import Floats, Prediction
from service.http.errors import BrokenEnsembleError
from service.http.images import Images
from service.inference.ensemble import Ensembles
from service.inference.look import Canary
from service.inference.opening import Ensemble
from service.inference.policy import TOGETHER, Mode
from service.operations.shared import LockedError, Shared

SHARED = "MODEPATH_ROLLOUTS"  # names the tallies to workers
WAITING = 32  # comparisons that may wait
ROWS = 32  # rows of one request that are compared
HELD_BYTES = 2**24  # of images that wait to be compared
LOWEST = 19  # niceness
STUCK_SECONDS = 15.0  # a canary that has no answer for so long has failed
AGAIN_SECONDS = 5.0  # until the store is asked again to record that a roll-out has ended
Reason = Literal["errors", "disagreement", "slowdown"]
Outcome = Literal["same", "different", "not_compared", "failed", "skipped"]
T = TypeVar("T")
Ask = Callable[[Ensemble], Awaitable[T]]  # runs one version on the images of a request
log = logging.getLogger("bentoml.modepath")


@dataclass(slots=True)
class Tally:
    """What happened to a canary, in all workers. The order of the fields is that of the shared memory."""

    requests: float = 0  # that it computed, for an answer or a comparison
    failures: float = 0  # of them
    rows: float = 0  # whose labels were compared
    different: float = 0  # of them, labelled differently
    timed: float = 0  # rows that both versions computed
    own_seconds: float = 0  # time for them
    active_seconds: float = 0  # time of the active version for them
    ended: float = 0  # 1: a limit was exceeded

    def exceeds(self, rule: Rule) -> Reason | None:
        """Return the limit that is exceeded. Every share is judged as of `rule.requests` requests or rows at least."""
        if rule.errors is not None and self.failures > rule.errors * max(self.requests, rule.requests):
            return "errors"
        if rule.disagreement is not None and self.different > rule.disagreement * max(self.rows, rule.requests):
            return "disagreement"
        allowed = math.inf if rule.slowdown is None else rule.slowdown * self.active_seconds
        if self.timed >= rule.requests and self.own_seconds > allowed:
            return "slowdown"
        return None


FIELDS = tuple(field.name for field in fields(Tally))
NUMBERS = len(FIELDS)


class Meter(Protocol):
    """Counts what happens to canaries; see metrics.py."""

    def expect_canary(self, labels: tuple[str, str]) -> None:
        """Set the counters of a canary to 0."""
        ...

    def canary(self, labels: tuple[str, str], outcome: Literal["answered", "failed"]) -> None:
        """Count a request that a canary answered, or failed, so that the active version answered it."""
        ...

    def shadowed(
        self,
        labels: tuple[str, str],
        outcomes: dict[Outcome, int],
        seconds: tuple[float, float],
        entropies: list[float],
    ) -> None:
        """Count a comparison: rows by outcome, the seconds of both versions, and differences of predictive entropy."""
        ...

    def rolled_back(self, labels: tuple[str, str], reason: Reason) -> None:
        """Count a canary that was rolled back."""
        ...


@dataclass(frozen=True, slots=True)
class _Comparison:
    active: Ensemble
    canary: Ensemble
    plan: RollOut
    mode: Mode
    images: Images


class RollOuts:
    """The canaries of one worker."""

    def __init__(self, store: Store, ensembles: Ensembles, meter: Meter, tallies: Shared | None = None):
        """`tallies` are the numbers that the workers share; None: those of this service."""
        self._store, self._ensembles, self._meter = store, ensembles, meter
        self._tallies = tallies or Shared.inherited(SHARED, NUMBERS)
        self._known: set[str] = set()  # ids of roll-outs that this worker has seen
        self._ended: set[str] = set()  # ids of roll-outs that this worker found to be ended
        # Bytes of images that were queued, and that were taken out: each is written by one thread, so no lock is needed.
        self._queued = self._taken = 0
        self._waiting: queue.Queue[_Comparison | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._turn = False
        self._closed = False

    @classmethod
    def prepare(cls) -> None:
        """Create the tallies. Called in the process that starts the workers."""
        Shared.make(SHARED, NUMBERS)

    # For requests

    def choose(self, active: Ensemble, caller: str) -> Ensemble:
        """Return the version that answers a request: the active one or its canary.

        Args:
            active: the ensemble that was asked.
            caller: the name of the caller; "" if it is not known: then every request counts as a new caller.
        """
        if (found := self._going_on(active)) is None or not found[1].plan.share:
            return active
        canary, plan = found[0], found[1].plan
        return canary if position(f"{canary.manifest.name}@{plan.version}", caller) < plan.share else active

    async def answer(self, active: Ensemble, canary: Ensemble, ask: Ask[T]) -> tuple[Ensemble, T]:
        """Let a canary answer a request, or the active version where it fails; return which one did, and the answer.

        A failure counts only if the active version does not fail on the same rows, because some inputs make every network fail.
        """
        began = time.monotonic()
        try:
            found = await ask(canary)
        except BrokenEnsembleError as error:
            found = await ask(active)
            self._failed(active, canary, str(error))
            return active, found
        except asyncio.CancelledError:
            if (
                time.monotonic() - began > STUCK_SECONDS
            ):  # not a client that left, but a request that had no answer for so long
                self._failed(active, canary, f"it did not answer within {STUCK_SECONDS:g} s")
            raise
        if (plan := self._plan_of(active, canary)) is not None:
            self._meter.canary(_labels(canary), "answered")
            self._count(canary, plan, Tally(requests=1))
        return canary, found

    def compare(self, active: Ensemble, mode: Mode, images: Images) -> None:
        """Compare both versions on the images of an answered request if it is its turn."""
        if (found := self._going_on(active)) is None:
            return
        canary, plan = found[0], found[1].plan
        if not plan.shadow or random.random() >= plan.shadow:
            return
        compared: Mode = "average" if mode in TOGETHER else mode
        rows = min(len(images), ROWS)
        if compared not in canary.sessions:
            return
        if self._queued - self._taken + images[:rows].nbytes > HELD_BYTES or self._waiting.full():
            self._meter.shadowed(_labels(canary), {"skipped": rows}, (0.0, 0.0), [])
            return
        self._start()
        # A copy: a view would keep the whole request in memory.
        one = _Comparison(active, canary, plan, compared, images[:rows].copy())
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(one)
            self._queued += one.images.nbytes

    def _failed(self, active: Ensemble, canary: Ensemble, why: str) -> None:
        if (plan := self._plan_of(active, canary)) is not None:
            log.warning("the canary %s@%d failed on a request: %s", active.manifest.name, plan.version, why)
            self._meter.canary(_labels(canary), "failed")
            self._count(canary, plan, Tally(requests=1, failures=1))

    def _plan_of(self, active: Ensemble, canary: Ensemble) -> RollOut | None:
        found = self._going_on(active)
        return found[1].plan if found is not None and found[0] is canary else None

    def tally(self, plan: RollOut) -> Tally:
        """Return what happened to a canary so far."""
        return Tally(*(self._tallies.glance(plan.id) or ()))

    def close(self) -> None:
        """End the thread after its current comparison."""
        self._closed = True
        with contextlib.suppress(queue.Full):  # then the thread is awake anyway
            self._waiting.put_nowait(None)

    # Judging

    def _going_on(self, active: Ensemble) -> tuple[Ensemble, Canary] | None:
        found = self._ensembles.canary(active.manifest.name)
        if found is None or found[1].plan.id in self._ended:
            return None
        plan = found[1].plan
        if plan.id not in self._known:
            self._known.add(plan.id)
            self._meter.expect_canary(_labels(found[0]))
        if self.tally(plan).ended:  # another worker has found that
            tally = self.tally(plan)
            reason = tally.exceeds(plan.rule)
            self._end(
                active.manifest.name,
                plan,
                _why(reason, tally, plan.rule) if reason else "a limit of its rule was exceeded",
            )
            return None
        return found

    def _count(self, canary: Ensemble, plan: RollOut, more: Tally) -> None:
        name = canary.manifest.name
        try:
            with self._tallies.locked(plan.id) as slot:
                slot.values = [old + getattr(more, field) for old, field in zip(slot.values, FIELDS, strict=True)]
                tally = Tally(*slot.values)
                reason = None if tally.ended else tally.exceeds(plan.rule)
                if reason is not None:
                    slot.values[-1] = tally.ended = 1.0
        except LockedError:
            return  # one request less is judged
        if reason is not None:
            why = _why(reason, tally, plan.rule)
            log.error("ROLLED BACK: %s@%d, because %s", name, plan.version, why)
            self._meter.rolled_back(_labels(canary), reason)
            self._end(name, plan, why)

    def _end(self, name: str, plan: RollOut, why: str) -> None:
        """End a roll-out here at once, and in the store as soon as it can be written."""
        if plan.id not in self._ended:
            self._ended.add(plan.id)
            threading.Thread(target=self._record, args=(name, plan.id, why), name="roll-back", daemon=True).start()

    def _record(self, name: str, plan: str, why: str) -> None:
        said = False
        while not self._closed:
            try:
                self._store.end_roll_out(name, why, only=plan)
            except StoreError as error:
                if not said:
                    log.error(
                        "the roll-back of %s is not recorded in the store, and is tried again until it is; other replicas do not know of it yet: %s",
                        name, error,
                    )  # fmt: skip
                said = True
                time.sleep(AGAIN_SECONDS)
            else:
                return

    # The thread that compares

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="canaries", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # only Linux has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
        while not self._closed:
            one = self._waiting.get()
            try:
                if one is not None:
                    self._taken += one.images.nbytes
                    if one.plan.id not in self._ended:
                        self._compare(one)
            except Exception:  # an ended thread would not be replaced
                log.exception("a canary could not be compared")
            one = None  # otherwise an idle thread would keep both versions in memory

    def _compare(self, one: _Comparison) -> None:
        labels, rows, together = _labels(one.canary), len(one.images), one.mode in TOGETHER
        found: dict[bool, tuple[Prediction, float]] = {}
        failure: Exception | None = None
        self._turn = (
            not self._turn
        )  # each version comes first in turn, because the second finds the images in the cache
        for is_canary in (self._turn, not self._turn):
            ensemble = one.canary if is_canary else one.active
            # On a CPU the time of this thread: as the one of the lowest priority, it is interrupted often.
            clock = time.perf_counter if "CUDAExecutionProvider" in ensemble.providers else time.thread_time
            began = clock()
            try:
                found[is_canary] = _answer(ensemble, one.mode, one.images), clock() - began
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                if not is_canary:
                    return  # some inputs make every network fail
                failure = error
        if failure is not None:
            log.warning("the canary %s@%s failed on a compared request: %s", *labels, failure)
            self._meter.shadowed(labels, {"failed": rows}, (0.0, 0.0), [])
            self._count(one.canary, one.plan, Tally(requests=1, failures=1))
            return
        (new, own), (old, active) = found[True], found[False]
        tally = Tally(requests=1, timed=rows, own_seconds=own, active_seconds=active)
        outcomes: dict[Outcome, int] = {
            "not_compared": rows
        }  # where each version draws a network, labels differ by chance
        entropies: list[float] = []
        if together:
            different = int((new.label != old.label).sum())
            tally.rows, tally.different = rows, different
            outcomes = {"same": rows - different, "different": different}
            if not one.active.policy.hides(one.mode):
                entropies = (new.predictive_entropy - old.predictive_entropy).tolist()
        self._meter.shadowed(labels, outcomes, (own, active), entropies)
        self._count(one.canary, one.plan, tally)


def position(version: str, caller: str) -> float:
    """Return where a caller stands among all, in [0, 1): always the same for one version; at random for the caller ""."""
    if not caller:
        return random.random()
    return int.from_bytes(hashlib.sha256(f"{version} {caller}".encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64


def _answer(ensemble: Ensemble, mode: Mode, images: Images) -> Prediction:
    session, rows = ensemble.sessions[mode], ensemble.rows(mode, images)
    with np.errstate(all="ignore"):  # the result is checked for NaN below
        outputs = session.joined([session.run(task, rows) for task in range(session.tasks(len(rows)))])
        prediction = session.settle(rows, outputs).prediction
    probs: Floats = prediction.mean_probs
    if not np.isfinite(probs).all():
        raise ValueError("it answers with NaN")
    return prediction


def _labels(ensemble: Ensemble) -> tuple[str, str]:
    return ensemble.manifest.name, str(ensemble.manifest.version)


def _why(reason: Reason, tally: Tally, rule: Rule) -> str:
    if reason == "errors":
        return f"it failed {tally.failures:.0f} of {tally.requests:.0f} requests; the rule allows a share of {rule.errors:g} of {rule.requests} or more"
    if reason == "disagreement":
        return (
            f"it labelled {tally.different:.0f} of {tally.rows:.0f} compared rows differently; the rule allows a share of "
            f"{rule.disagreement:g} of {rule.requests} or more"
        )
    return (
        f"it took {tally.own_seconds / max(tally.active_seconds, 1e-9):.2f} times the time of the active version for {tally.timed:.0f} rows; "
        f"the rule allows {rule.slowdown:g} times"
    )
