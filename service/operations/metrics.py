"""The Prometheus metrics, with the labels {ensemble, version, mode}. Uncertainties are observed per row, times per request.

Workers write to files in one folder, which the process that starts them creates. The worker that is scraped sums up all
files: the metrics are those of all workers, and the counts of a worker that died are kept (see metric_files.py).
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

FOLDER = "MODEPATH_METRICS_FOLDER"
_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
if FOLDER in os.environ:
    # BentoML would use a folder under its home, which is emptied when a second server starts there.
    os.environ[_MULTIPROCESS] = os.environ[FOLDER]

import numpy as np  # noqa: E402
import prometheus_client  # noqa: E402 - it reads the folder's variable when it is imported
from numpy.typing import NDArray  # noqa: E402
from prometheus_client import CollectorRegistry, Counter, Histogram, values  # noqa: E402

from models_store.manifest import ECE_BINS, Manifest  # noqa: E402
from service.feedback.answers import Counted  # noqa: E402
from service.http.errors import ServiceError  # noqa: E402
from service.inference.decisions import NOTHING, Decided  # noqa: E402
from service.inference.pieces import Answer  # noqa: E402
from service.inference.policy import TOGETHER, Mode  # noqa: E402
from service.inference.rollout import Outcome, Reason  # noqa: E402
from service.operations import metric_files  # noqa: E402

prometheus_client.disable_created_metrics()  # they would double the number of series
if FOLDER in os.environ:
    values.ValueClass = metric_files.Value  # pyright: ignore[reportAttributeAccessIssue]
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
RATIO = [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]
SECONDS = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
MEMBERS = [1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0, 256.0]
DIFFERENCES = [-1.0, -0.3, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0]
SIZES = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0, 100.0]
LABELS = ["ensemble", "version", "mode"]
REJECTED = (
    "duplicate",
    "unknown",
    "expired",
    "row",
    "label",
    "name",
    "malformed",
)  # reasons of labels that are not counted
CLIENT_LEFT = "client_left"  # reason of a request that was dropped because its client had disconnected
_own = CollectorRegistry()


def _histogram(name: str, what: str, buckets: list[float]) -> Histogram:
    return Histogram(f"modepath_{name}", what, LABELS, buckets=buckets, registry=_own)


_ROW = {
    "predictive_entropy": _histogram("predictive_entropy_ratio", "entropy of the average, over ln(classes)", RATIO),
    "expected_entropy": _histogram("expected_entropy_ratio", "mean entropy of the members, over ln(classes)", RATIO),
    "mutual_information": _histogram(
        "mutual_information_ratio", "predictive minus expected entropy, over ln(classes)", RATIO
    ),
    "disagreement": _histogram("disagreement_ratio", "share of members with another top class", RATIO),
    "confidence": _histogram("confidence_ratio", "probability of the top class", RATIO),
}
_ENTROPIES = {"predictive_entropy", "expected_entropy", "mutual_information"}
_OF_ONE = [(name, _ROW[name]) for name in ("predictive_entropy", "confidence")]  # measures of a single network
_members_used = _histogram("members_used", "members that answered a row", MEMBERS)
_TIMES = {
    "decode": _histogram("decode_seconds", "time from the bytes of the body to an array", SECONDS),
    "queue": _histogram("queue_seconds", "time that a request waited for its turn", SECONDS),
    "members": _histogram("members_seconds", "time of running members, in turn with other requests", SECONDS),
    "reply": _histogram("reply_seconds", "time from arrays to the bytes of the answer", SECONDS),
}
_predictions = Counter("modepath_predictions", "rows answered", [*LABELS, "class"], registry=_own)
_decisions = Counter(
    "modepath_decisions",
    "rows by decision: predict, or the reason to abstain (uncertain, unlike_training)",
    [*LABELS, "decision"],
    registry=_own,
)
_set_size = _histogram("prediction_set_classes", "classes in a prediction set", SIZES)


def _of_feedback(name: str, what: str, *labels: str) -> Counter:
    return Counter(f"modepath_feedback_{name}", what, [*LABELS, *labels], registry=_own)


_labelled = _of_feedback("rows", "rows whose label was reported, by bin of the confidence (15 of equal width)", "bin")
_correct = _of_feedback("correct", "rows of them that were answered correctly", "bin")
_confidence_sum = _of_feedback("confidence", "sum of the confidence of rows whose label was reported", "bin")
_nll_sum = _of_feedback("nll", "sum of the negative log-likelihood of rows whose label was reported, nats")
_brier_sum = _of_feedback("brier", "sum of the Brier score of rows whose label was reported")
_sets = _of_feedback("sets", "prediction sets whose label was reported, by the coverage that was asked for", "coverage")
_covered = _of_feedback("covered", "prediction sets of them that contain the label", "coverage")
_decided = _of_feedback("decided", "rows with a decision whose label was reported", "decision")
_wrong = _of_feedback("wrong", "rows of them whose answer names another class", "decision")
_rejected = Counter("modepath_feedback_rejected", "labels that were rejected", ["reason"], registry=_own)
_lost = Counter("modepath_feedback_lost", "answers that could not be kept for feedback", registry=_own)
_drift = ["measure", "bin"]
_baseline = Counter(
    "modepath_drift_baseline_rows",
    "calibration images by bin of a measure (deciles, or classes)",
    [*LABELS, *_drift],
    registry=_own,
)
_live = Counter(
    "modepath_drift_rows", "rows of a sample of the requests by the same bins", [*LABELS, *_drift], registry=_own
)
_alarms = Counter(
    "modepath_drift_alarms",
    "alarms of the sequential test of a measure; with a probability of at most 0.01 there is any among a million unchanged rows",
    [*LABELS, "measure"],
    registry=_own,
)
_VERSION = ["ensemble", "version"]
_canary_requests = Counter(
    "modepath_canary_requests",
    "requests that a canary answered, or failed, so that the active version answered them",
    [*_VERSION, "outcome"],
    registry=_own,
)
_shadow_rows = Counter(
    "modepath_shadow_rows",
    "rows for which a canary was compared with the active version: same or different label; not_compared, where a network is drawn; failed; or skipped, for lack of time",
    [*_VERSION, "outcome"],
    registry=_own,
)
_shadow_seconds = Counter(
    "modepath_shadow_seconds", "time that either version took for the compared rows", [*_VERSION, "of"], registry=_own
)
_shadow_entropy = Histogram(
    "modepath_shadow_entropy_difference",
    "predictive entropy of the canary minus that of the active version, nats",
    _VERSION,
    buckets=DIFFERENCES,
    registry=_own,
)
_rollbacks = Counter(
    "modepath_rollbacks", "canaries that were rolled back, by the limit exceeded", [*_VERSION, "reason"], registry=_own
)
_refused = Counter("modepath_refused", "requests that were refused", ["reason"], registry=_own)
_dropped = Counter("modepath_log_lines_dropped", "lines that could not be written to the log", registry=_own)
_archive: metric_files.Archive | None = None
_expected: set[tuple[tuple[str, str, str], str | None, bool]] = set()  # for which expect_feedback was called
_children: dict[tuple[Any, tuple[str, ...]], Any] = {}
_said: set[str] = set()  # topics of problems that were logged and still persist
Metric = TypeVar("Metric", Counter, Histogram)
log = logging.getLogger("bentoml.modepath")


def answered(
    manifest: Manifest,
    mode: Mode,
    answer: Answer,
    decode_seconds: float,
    reply_seconds: float,
    *,
    each: bool = True,
    decided: Decided = NOTHING,
) -> None:
    """Count one request that was answered.

    Without `each`, only the predicted classes are counted: the change of a histogram's sum over one query would reveal
    the exact value of that query.
    """
    labels = (manifest.name, str(manifest.version), mode)
    prediction = answer.prediction
    labels_of_rows: list[int] = prediction.label.tolist()
    for label in labels_of_rows:
        _child(_predictions, *labels, manifest.classes[label]).inc()
    for decision, reason in decided.decisions or ():
        _decisions.labels(*labels, reason or decision).inc()
    if not each:
        return
    for classes in decided.sets or ():
        _set_size.labels(*labels).observe(len(classes))
    to_ratio = 1 / math.log(len(manifest.classes)) if len(manifest.classes) > 1 else 0.0
    for measure, histogram in _ROW.items() if mode in TOGETHER else _OF_ONE:
        child = _child(histogram, *labels)
        scale = to_ratio if measure in _ENTROPIES else 1.0
        values: list[float] = getattr(prediction, measure).tolist()
        for value in values:
            child.observe(value * scale)
    if mode in TOGETHER:
        observe = _child(_members_used, *labels).observe
        for used in answer.used.tolist() if answer.used is not None else [len(manifest.members)] * len(labels_of_rows):
            observe(used)
    spent = {
        "decode": decode_seconds,
        "queue": answer.queue_seconds,
        "members": answer.members_seconds,
        "reply": reply_seconds,
    }
    for stage, seconds in spent.items():
        _child(_TIMES[stage], *labels).observe(seconds)


def _child(metric: Metric, *labels: str) -> Metric:
    """Return the series of a metric with these labels; its own `labels` takes three times as long. Series are never removed."""
    found: Any = _children.get((metric, labels))
    if found is None:
        found = _children[metric, labels] = metric.labels(*labels)
    return found


def drift_baseline(labels: tuple[str, str, str], measure: str, counts: NDArray[np.intp]) -> None:
    """Count calibration values by bin, once in each worker; only their shares are used."""
    for number, count in enumerate(counts.tolist()):
        _baseline.labels(*labels, measure, str(number)).inc(count)
        _live.labels(*labels, measure, str(number)).inc(0)
    _alarms.labels(*labels, measure).inc(0)


def drift_live(labels: tuple[str, str, str], measure: str, counts: NDArray[np.intp], alarms: int) -> None:
    """Count values of a sample of the requests by bin, and alarms of the sequential test."""
    for number, count in enumerate(counts.tolist()):
        if count:
            _live.labels(*labels, measure, str(number)).inc(count)
    if alarms:
        _alarms.labels(*labels, measure).inc(alarms)


def expect_feedback(labels: tuple[str, str, str], coverage: float | None, *, decided: bool) -> None:
    """Set the counters of labels for such answers to 0, so that the first label is an increase.

    Args:
        labels: ensemble, version and mode of the answer.
        coverage: of its prediction sets; None without sets.
        decided: whether it has decisions.
    """
    key = labels, None if coverage is None else _rounded(coverage), decided
    if key in _expected:
        return
    _expected.add(key)
    for number in range(1, ECE_BINS + 1):
        for counter in (_labelled, _correct, _confidence_sum):
            counter.labels(*labels, str(number)).inc(0)
    for counter in (_nll_sum, _brier_sum):
        counter.labels(*labels).inc(0)
    if coverage is not None:
        for counter in (_sets, _covered):
            counter.labels(*labels, _rounded(coverage)).inc(0)
    if decided:
        for counter in (_decided, _wrong):
            for decision in ("predict", "abstain"):
                counter.labels(*labels, decision).inc(0)


def _rounded(coverage: float) -> str:
    """The label of a coverage. Clients choose it, so it is rounded to bound the number of series."""
    return f"{coverage:.2f}"


def scored(one: Counted) -> None:
    """Count a label that was reported for a row of an earlier answer."""
    result, labels = one.result, (one.ensemble, str(one.version), one.mode)
    number = "hidden" if result.bin is None else str(result.bin)
    _labelled.labels(*labels, number).inc()
    _correct.labels(*labels, number).inc(int(result.correct))
    if result.confidence is not None and result.nll is not None and result.brier is not None:
        _confidence_sum.labels(*labels, number).inc(result.confidence)
        _nll_sum.labels(*labels).inc(result.nll)
        _brier_sum.labels(*labels).inc(max(result.brier, 0.0))
    if result.covered is not None and result.coverage is not None:
        _sets.labels(*labels, _rounded(result.coverage)).inc()
        _covered.labels(*labels, _rounded(result.coverage)).inc(int(result.covered))
    if result.answered is not None:
        decision = "predict" if result.answered else "abstain"
        _decided.labels(*labels, decision).inc()
        _wrong.labels(*labels, decision).inc(int(not result.correct))


def rejected(reason: str) -> None:
    """Count a label that was rejected."""
    _rejected.labels(reason).inc()


def lost(count: int) -> None:
    """Count answers that could not be kept for feedback."""
    _lost.inc(count)


def expect_canary(labels: tuple[str, str]) -> None:
    """Set the counters of a canary to 0, so that its first failure is an increase."""
    for outcome in ("answered", "failed"):
        _canary_requests.labels(*labels, outcome).inc(0)
    for outcome in ("same", "different", "not_compared", "failed", "skipped"):
        _shadow_rows.labels(*labels, outcome).inc(0)
    for reason in ("errors", "disagreement", "slowdown"):
        _rollbacks.labels(*labels, reason).inc(0)


def canary(labels: tuple[str, str], outcome: Literal["answered", "failed"]) -> None:
    """Count a request that a canary answered, or failed, so that the active version answered it."""
    _canary_requests.labels(*labels, outcome).inc()


def shadowed(
    labels: tuple[str, str], outcomes: dict[Outcome, int], seconds: tuple[float, float], entropies: list[float]
) -> None:
    """Count a comparison: rows by outcome, the seconds of both versions, and differences of predictive entropy."""
    for outcome, rows in outcomes.items():
        _shadow_rows.labels(*labels, outcome).inc(rows)
    for of, spent in zip(("canary", "active"), seconds, strict=True):
        _shadow_seconds.labels(*labels, of).inc(spent)
    for difference in entropies:
        _shadow_entropy.labels(*labels).observe(difference)


def rolled_back(labels: tuple[str, str], reason: Reason) -> None:
    """Count a canary that was rolled back."""
    _rollbacks.labels(*labels, reason).inc()


def refused(reason: str) -> None:
    """Count one request that was refused."""
    _refused.labels(reason).inc()


def dropped(lines: int) -> None:
    """Count log lines that were dropped."""
    _dropped.inc(lines)


def begin() -> None:
    """Set the counter of every refusal reason to 0, so that alerts see the first refusal as an increase.

    Called in each worker.
    """
    for reason in (CLIENT_LEFT, *(error.reason for error in (ServiceError, *ServiceError.__subclasses__()))):
        _refused.labels(reason)
    for outcome in REJECTED:
        _rejected.labels(outcome)
    _lost.inc(0)


def look() -> bool:
    """Create missing files, and return False if some values are only in this process's memory.

    Called in each worker, every second.
    """
    complete = metric_files.look()
    _say_once(
        "files", not complete, "The metrics folder %s cannot be written: is its file system full? This worker keeps counting in memory; "
        "/metrics includes its counts only if it answers the request itself.", os.environ.get(FOLDER),
    )  # fmt: skip
    return complete


def exposition() -> bytes:
    """Return the metrics of all workers in Prometheus's text format."""
    return prometheus_client.generate_latest(_all_workers())


def prepare() -> None:
    """Create the folder that the workers share, and remove it at exit. Called in the process that starts the workers.

    Raises:
        OSError: no temporary folder can be written.
    """
    global _archive
    try:
        folder = tempfile.mkdtemp(prefix="modepath-metrics-")
    except OSError as error:
        raise OSError(f"No temporary folder can be written: {error}. Name a writable folder with TMPDIR.") from None
    os.environ[FOLDER] = folder
    _archive = metric_files.Archive(Path(folder))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def archive(living: Collection[int]) -> None:
    """Merge the files of dead workers. Called periodically in the process that starts the workers."""
    assert _archive is not None, "prepare comes first"
    failed = None
    try:
        _archive.merge(living)
    except OSError as error:  # the files stay unchanged, and are still counted
        failed = error
    _say_once("archive", failed is not None, "The metrics of dead workers cannot be merged: %s", failed)


def remove_folder() -> None:
    """Remove the folder. Called in a worker whose parent has ended, because the parent can no longer do it."""
    if (folder := os.environ.get(FOLDER)) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def listen(host: str, port: int, incomplete: Callable[[], int]) -> None:
    """Serve the metrics on a separate listener. Called in the process that starts the workers.

    Raises:
        OSError: the port is in use, or the address does not belong to this machine.
    """
    count_incomplete(incomplete)
    try:
        prometheus_client.start_http_server(port, host, _all_workers())
    except OSError as error:
        raise OSError(
            f"Cannot listen on {host}:{port} for /metrics: {error.strerror}. Does another process listen there? "
            "Choose another port with MODEPATH_METRICS_PORT, an address of this machine with MODEPATH_METRICS_HOST."
        ) from None


def count_incomplete(count: Callable[[], int]) -> None:
    """Set the function that returns how many workers have incomplete metrics; the default counts only this process."""
    global _incomplete
    _incomplete = count


def _incomplete() -> int:
    return 0 if metric_files.look() else 1


def _all_workers() -> CollectorRegistry:
    folder = os.environ.get(FOLDER)
    if folder is None:  # one process, as in tests
        return _own
    registry = CollectorRegistry()
    registry.register(metric_files.Sum(Path(folder), lambda: _incomplete()))
    return registry


def _say_once(topic: str, holds: bool, message: str, *values: object) -> None:
    if holds and topic not in _said:
        log.error(message, *values)
        _said.add(topic)
    elif not holds and topic in _said:
        log.info("The metrics are complete again.")
        _said.discard(topic)
