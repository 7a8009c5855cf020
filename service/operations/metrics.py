"""What Prometheus reads. Labels {ensemble, mode}; uncertainties one observation a row, times one a request.

Workers write into files of one folder, made by the process that starts them, and the one that is asked sums them up: the
numbers are those of all workers, and those of a worker that died stay counted (see metric_files.py).
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

FOLDER = "MODEPATH_METRICS_FOLDER"
_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
if FOLDER in os.environ:
    # BentoML names a folder under its home, and wipes it when a second server starts there.
    os.environ[_MULTIPROCESS] = os.environ[FOLDER]

import prometheus_client  # noqa: E402 - it reads the folder's variable when it is imported
from prometheus_client import CollectorRegistry, Counter, Histogram, values  # noqa: E402

from models_store.manifest import Manifest  # noqa: E402
from service.http.errors import ServiceError  # noqa: E402
from service.inference.batching import Answer  # noqa: E402
from service.inference.policy import Mode  # noqa: E402
from service.operations import metric_files  # noqa: E402

prometheus_client.disable_created_metrics()  # they would double the series
if FOLDER in os.environ:
    values.ValueClass = metric_files.Value  # pyright: ignore[reportAttributeAccessIssue]
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
RATIO = [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]
SECONDS = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
MEMBERS = [1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0, 256.0]
LABELS = ["ensemble", "mode"]
CLIENT_LEFT = "client_left"  # reason of a request that was dropped because its client was gone
_own = CollectorRegistry()


def _histogram(name: str, what: str, buckets: list[float]) -> Histogram:
    return Histogram(f"modepath_{name}", what, LABELS, buckets=buckets, registry=_own)


_ROW = {
    "predictive_entropy": _histogram("predictive_entropy_ratio", "entropy of the average, over ln(classes)", RATIO),
    "expected_entropy": _histogram("expected_entropy_ratio", "mean entropy of the members, over ln(classes)", RATIO),
    "mutual_information": _histogram("mutual_information_ratio", "their difference, over ln(classes)", RATIO),
    "disagreement": _histogram("disagreement_ratio", "share of members with another top class", RATIO),
    "confidence": _histogram("confidence_ratio", "probability of the top class", RATIO),
}
_ENTROPIES = {"predictive_entropy", "expected_entropy", "mutual_information"}
_OF_ONE = [(name, _ROW[name]) for name in ("predictive_entropy", "confidence")]  # what a network by itself has
_members_used = _histogram("members_used", "members that answered a row", MEMBERS)
_TIMES = {
    "decode": _histogram("decode_seconds", "from the body's bytes to an array", SECONDS),
    "queue": _histogram("queue_seconds", "waiting for its turn", SECONDS),
    "members": _histogram("members_seconds", "running members, in turn with others", SECONDS),
    "reply": _histogram("reply_seconds", "from arrays to the answer's bytes", SECONDS),
}
_predictions = Counter("modepath_predictions", "rows answered", [*LABELS, "class"], registry=_own)
_refused = Counter("modepath_refused", "requests that were refused", ["reason"], registry=_own)
_dropped = Counter("modepath_log_lines_dropped", "lines that could not be written to the log", registry=_own)
_archive: metric_files.Archive | None = None
_said: set[str] = set()  # what was logged, and has not ended since
log = logging.getLogger("bentoml.modepath")


def answered(
    manifest: Manifest, mode: Mode, answer: Answer, decode_seconds: float, reply_seconds: float, *, each: bool = True
) -> None:
    """Count one request that was answered. Without `each`, nothing that tells one answer from another but its class:

    a histogram's sum before and after one query is that query's own number.
    """
    labels = (manifest.name, mode)
    prediction = answer.prediction
    labels_of_rows: list[int] = prediction.label.tolist()
    for label in labels_of_rows:
        _predictions.labels(*labels, manifest.classes[label]).inc()
    if not each:
        return
    to_ratio = 1 / math.log(len(manifest.classes)) if len(manifest.classes) > 1 else 0.0
    for measure, histogram in _ROW.items() if mode == "average" else _OF_ONE:
        child = histogram.labels(*labels)
        scale = to_ratio if measure in _ENTROPIES else 1.0
        values: list[float] = getattr(prediction, measure).tolist()
        for value in values:
            child.observe(value * scale)
    if mode == "average":
        used = _members_used.labels(*labels)
        for _ in labels_of_rows:
            used.observe(len(manifest.members))
    spent = {
        "decode": decode_seconds,
        "queue": answer.queue_seconds,
        "members": answer.members_seconds,
        "reply": reply_seconds,
    }
    for stage, seconds in spent.items():
        _TIMES[stage].labels(*labels).observe(seconds)


def refused(reason: str) -> None:
    """Count one request that was refused."""
    _refused.labels(reason).inc()


def dropped(lines: int) -> None:
    """Count lines that the log did not take."""
    _dropped.inc(lines)


def begin() -> None:
    """In each worker: let every reason stand at 0, so that its first refusal is an increase that alerts can see."""
    for reason in (CLIENT_LEFT, *(error.reason for error in (ServiceError, *ServiceError.__subclasses__()))):
        _refused.labels(reason)


def look() -> bool:
    """In each worker, every second: make files that are missing. False if some numbers are in this process's memory only."""
    complete = metric_files.look()
    _say_once(
        "files", not complete, "The folder of the metrics cannot be written: is its file system full? /metrics lacks "
        "what this worker counts, unless this worker is asked. It goes on: %s", os.environ.get(FOLDER),
    )  # fmt: skip
    return complete


def exposition() -> bytes:
    """All workers' numbers in Prometheus's text format."""
    return prometheus_client.generate_latest(_all_workers())


def prepare() -> None:
    """In the process that starts the workers: make the folder that they will share, and remove it at the end.

    Raises:
        OSError: no temporary folder can be written.
    """
    global _archive
    try:
        folder = tempfile.mkdtemp(prefix="modepath-metrics-")
    except OSError as error:
        raise OSError(f"No temporary folder can be written: {error}. Name one that can with TMPDIR.") from None
    os.environ[FOLDER] = folder
    _archive = metric_files.Archive(Path(folder))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def archive(living: Collection[int]) -> None:
    """In the process that starts the workers, now and then: merge the files of those that died."""
    assert _archive is not None, "prepare comes first"
    failed = None
    try:
        _archive.merge(living)
    except OSError as error:  # the files stay, and count, as they are
        failed = error
    _say_once("archive", failed is not None, "The metrics of dead workers cannot be merged: %s", failed)


def remove_folder() -> None:
    """In a worker whose parent is gone: there is nobody else who would."""
    if (folder := os.environ.get(FOLDER)) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def listen(host: str, port: int, incomplete: Callable[[], int]) -> None:
    """In the process that starts the workers: serve the numbers on a listener of their own.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
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
    """How it is known of how many workers the numbers are incomplete; without it, a process knows of itself."""
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
