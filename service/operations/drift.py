"""Compares what arrives with the calibration images, off the request path: see models_store/decisions/drift.py.

A thread looks at a sample of at most ROWS rows a second, chosen by the time of arrival alone, so that monitoring costs
the same at any rate of requests.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from models_store.decisions import drift
from models_store.decisions.calibration import Calibration
from models_store.decisions.drift import Bins, SequentialTest
from models_store.uncertainty import Prediction

ROWS = 50  # of each worker and second
SECONDS = 1.0
log = logging.getLogger("bentoml.modepath")
Labels = tuple[str, str, str]  # ensemble, version, mode


class Counts(Protocol):
    """What the monitor reports to the metrics."""

    def drift_baseline(self, labels: Labels, measure: str, counts: NDArray[np.intp]) -> None:
        """Count calibration values by bin."""
        ...

    def drift_live(self, labels: Labels, measure: str, counts: NDArray[np.intp], alarms: int) -> None:
        """Count values that arrived by bin, and alarms of the test."""
        ...


@dataclass(slots=True)
class _Watched:
    labels: Labels
    tests: dict[str, SequentialTest]
    bins: dict[str, Bins]
    rows: list[tuple[NDArray[np.float32], Prediction]] = field(
        default_factory=list[tuple[NDArray[np.float32], Prediction]]
    )


class DriftMonitor:
    """The monitor of one worker process."""

    def __init__(self, counts: Counts):
        """Start the thread."""
        self._counts = counts
        self._lock = threading.Lock()
        # Several modes may share a calibration; each is tested by itself.
        self._watched: WeakKeyDictionary[Calibration, dict[Labels, _Watched]] = WeakKeyDictionary()
        self._room = ROWS
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="drift", daemon=True).start()

    def add(
        self, labels: Labels, calibration: Calibration, images: NDArray[np.float32], prediction: Prediction
    ) -> None:
        """Take a sample of an answer. Returns at once."""
        if self._room <= 0 or not calibration.drift:
            return
        with self._lock:
            count = min(self._room, len(images))
            self._room -= count
            of_modes = self._watched.setdefault(calibration, {})
            if (watched := of_modes.get(labels)) is None:
                watched = of_modes[labels] = _Watched(labels, {}, {})
            watched.rows.append((images[:count], prediction.rows(0, count)))

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _work(self) -> None:
        while not self._closed.wait(SECONDS):
            with self._lock:
                self._room = ROWS
                work = [
                    (calibration, one, one.rows)
                    for calibration, of_modes in self._watched.items()
                    for one in of_modes.values()
                    if one.rows
                ]
                for _, one, _ in work:
                    one.rows = []
            for calibration, one, rows in work:
                try:
                    self._look(calibration, one, rows)
                except Exception:  # requests are answered without it
                    log.exception("drift of %s cannot be tested", one.labels[0])
                time.sleep(0)  # lets the event loop have the interpreter's lock

    def _look(
        self, calibration: Calibration, one: _Watched, rows: list[tuple[NDArray[np.float32], Prediction]]
    ) -> None:
        if not one.tests:
            for measure, values in calibration.drift.items():
                one.tests[measure] = SequentialTest(values, len(calibration.drift))
                one.bins[measure] = Bins(measure, values)
                self._counts.drift_baseline(one.labels, measure, one.bins[measure].calibration)
        found = [drift.statistics(images, prediction) for images, prediction in rows]
        for measure, test in one.tests.items():
            values = np.concatenate([each[measure] for each in found])
            alarms = test.add(values)
            if alarms:
                log.warning(
                    "%s@%s, %s: the distribution of %s has changed since calibration (%d rows tested by this worker)",
                    *one.labels, measure.replace("_", " "), test.rows,
                )  # fmt: skip
            self._counts.drift_live(one.labels, measure, one.bins[measure].counts(values), alarms)
