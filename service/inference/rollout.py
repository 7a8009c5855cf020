"""Canaries: a new version answers a share of the callers beside the active one, is compared with it, and is rolled back.

A caller sees one version: a hash of its name decides. Where a canary fails on a request, the active version answers it.
Comparisons run after the answers, in a thread of the lowest priority, and are left out where it does not keep up. The
numbers that the operator's rule judges are those of all workers; the first worker that finds a limit exceeded ends the
roll-out for all of them at once, and records that in the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import queue
import random
import threading
import time
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import numpy as np

from models_store.errors import StoreError
from models_store.records.rollout import RollOut, Rule
from models_store.store import Store
from models_store.uncertainty import Floats, Prediction
from service.http.images import Images
from service.inference.ensemble import Ensembles
from service.inference.look import Canary
from service.inference.opening import Ensemble
from service.inference.policy import TOGETHER, Mode
from service.operations.shared import LockedError, Shared

SHARED = "MODEPATH_ROLLOUTS"  # names the tallies to workers
WAITING = 32  # comparisons that may wait
ROWS = 32  # rows of one request that are compared
LOWEST = 19  # niceness
AGAIN_SECONDS = 5.0  # until the store is asked again to record that a roll-out has ended
Reason = Literal["errors", "disagreement", "slowdown"]
Outcome = Literal["same", "different", "failed", "skipped"]
log = logging.getLogger("bentoml.modepath")


@dataclass(slots=True)
class Tally:
    """What happened to a canary, in all workers. The order of the fields is that of the shared memory."""

    requests: float = 0  # that it computed, for an answer or a comparison
    failures: float = 0  # of them
    rows: float = 0  # that were compared
    different: float = 0  # of them, labelled differently
    own_seconds: float = 0  # time for the compared rows
    active_seconds: float = 0  # time that the active version took for them
    ended: float = 0  # 1: a limit was exceeded

    def exceeds(self, rule: Rule) -> Reason | None:
        """Return the limit that is exceeded. Every share is judged as of `rule.requests` requests or rows at least."""
        if rule.errors is not None and self.failures > rule.errors * max(self.requests, rule.requests):
            return "errors"
        if rule.disagreement is not None and self.different > rule.disagreement * max(self.rows, rule.requests):
            return "disagreement"
        allowed = math.inf if rule.slowdown is None else rule.slowdown * self.active_seconds
        if self.rows >= rule.requests and self.own_seconds > allowed:
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
        self._unrecorded: dict[str, tuple[str, str]] = {}  # those that the store must still record: name, why
        self._waiting: queue.Queue[_Comparison | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._turn = False
        self._closed = False

    @classmethod
    def prepare(cls) -> None:
        """Create the tallies. Called in the process that starts the workers."""
        Shared.make(SHARED, NUMBERS)

    # For requests

    def choose(self, active: Ensemble, mode: Mode | None, caller: str) -> Ensemble:
        """Return the version that answers a request: the active one or its canary.

        Args:
            active: the ensemble that was asked.
            mode: the mode that was asked for, if any.
            caller: the name of the caller; "" if it is not known: then every request is one of its own.
        """
        if (found := self._going_on(active)) is None or not found[1].plan.share:
            return active
        canary, plan = found[0], found[1].plan
        if not caller and (mode or active.policy.modes[0]) == "keyed":
            return active  # the same image must get the same answer, so requests cannot be divided
        return canary if position(f"{canary.manifest.name}@{plan.version}", caller) < plan.share else active

    def answered(self, active: Ensemble, chosen: Ensemble, mode: Mode, images: Images) -> None:
        """Count an answer, and compare both versions on these images if it is their turn."""
        if (found := self._going_on(active)) is None:
            return
        canary, plan = found[0], found[1].plan
        if chosen is canary:
            self._meter.canary(_labels(canary), "answered")
            self._count(canary, plan, Tally(requests=1))
        if plan.shadow and random.random() < plan.shadow:
            compared: Mode = "average" if mode in TOGETHER else mode
            if compared not in canary.sessions:
                return
            with contextlib.suppress(queue.Full):
                self._start()
                self._waiting.put_nowait(_Comparison(active, canary, plan, compared, images[:ROWS]))
                return
            self._meter.shadowed(_labels(canary), {"skipped": min(len(images), ROWS)}, (0.0, 0.0), [])

    def failed(self, active: Ensemble, error: Exception) -> None:
        """Count a request that the canary failed; the active version answers it."""
        if (found := self._going_on(active)) is not None:
            log.warning("the canary %s@%d failed on a request: %s", active.manifest.name, found[1].plan.version, error)
            self._meter.canary(_labels(found[0]), "failed")
            self._count(found[0], found[1].plan, Tally(requests=1, failures=1))

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
            self._end(active.manifest.name, plan, "another worker of the service found a limit exceeded")
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
        self._ended.add(plan.id)
        self._unrecorded[plan.id] = name, why
        self._start()
        with contextlib.suppress(queue.Full):  # then the thread is awake anyway
            self._waiting.put_nowait(None)

    # The thread

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="canaries", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # only Linux has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
        while not self._closed:
            try:
                one = self._waiting.get(timeout=AGAIN_SECONDS if self._unrecorded else None)
            except queue.Empty:
                one = None
            try:
                self._record()
                if one is not None and one.plan.id not in self._ended:
                    self._compare(one)
            except Exception:  # an ended thread would not be replaced
                log.exception("a canary could not be compared")

    def _record(self) -> None:
        for plan, (name, why) in list(self._unrecorded.items()):
            try:
                self._store.end_roll_out(name, why, only=plan)
            except StoreError as error:
                log.error("the roll-back of %s is not recorded in the store yet, and is tried again: %s", name, error)
            else:
                del self._unrecorded[plan]

    def _compare(self, one: _Comparison) -> None:
        labels, rows = _labels(one.canary), len(one.images)
        found: dict[bool, tuple[Prediction, float]] = {}
        self._turn = (
            not self._turn
        )  # each version comes first in turn, because the second finds the images in the cache
        for is_canary in (self._turn, not self._turn):
            ensemble = one.canary if is_canary else one.active
            began = time.perf_counter()
            try:
                prediction = _answer(ensemble, one.mode, one.images)
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                if is_canary:
                    log.warning("the canary %s@%d failed on a compared request: %s", *labels, error)
                    self._meter.shadowed(labels, {"failed": rows}, (0.0, 0.0), [])
                    self._count(one.canary, one.plan, Tally(requests=1, failures=1))
                return
            found[is_canary] = prediction, time.perf_counter() - began
        (new, own), (old, active) = found[True], found[False]
        different = 0
        entropies: list[float] = []
        if one.mode in TOGETHER:  # where each version draws a network, labels differ by chance
            different = int((new.label != old.label).sum())
            if not one.active.policy.hides(one.mode):
                entropies = (new.predictive_entropy - old.predictive_entropy).tolist()
        self._meter.shadowed(labels, {"same": rows - different, "different": different}, (own, active), entropies)
        self._count(
            one.canary, one.plan,
            Tally(requests=1, rows=rows, different=different, own_seconds=own, active_seconds=active),
        )  # fmt: skip


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
        f"it took {tally.own_seconds / max(tally.active_seconds, 1e-9):.2f} times the time of the active version for {tally.rows:.0f} rows; "
        f"the rule allows {rule.slowdown:g} times"
    )
