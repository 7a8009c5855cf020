"""Python client of the service: numpy in and out, with retries.

It needs only numpy, httpx and tenacity (`pip install 'modepath[client]'`).

    with Client("http://127.0.0.1:3000") as client:
        answer = client.predict(images)                    # (batch, C, H, W), floats in [0, 1]
        answer.probs, answer.labels, answer.uncertainty["mutual_information"]
        client.predict([Path("a.png").read_bytes(), …])    # or encoded images

`AsyncClient` is the same with `async with` and `await`. A request that was refused because the service is busy (429,
503), or that was lost with its connection, is sent again after growing pauses, and not before the time in Retry-After
has passed.
"""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

import httpx
import numpy as np
import tenacity
from numpy.typing import ArrayLike, NDArray
from typing_extensions import TypedDict, Unpack

from models_store.errors import ModepathError

BUSY = (429, 503)
Images = ArrayLike | Sequence[bytes] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]] | Mapping[str, Any]


class RefusedError(ModepathError):
    """The service answered with an error. `.status` is the HTTP status; the message comes from the service."""

    def __init__(self, status: int, message: str, retry_after: float | None = None):
        super().__init__(f"{status}: {message}")
        self.status = status
        self.retry_after = retry_after  # seconds


@dataclass(frozen=True)
class Answer:
    """The answer for a batch."""

    ensemble: str
    version: int
    mode: str
    members_used: int | None  # None where it differs between rows (`cascade`), or one network answers each row
    request_id: str
    labels: NDArray[np.intp]  # (batch,)
    class_names: list[str]  # (batch,)
    probs: NDArray[np.float64] | None  # (batch, classes); None if the operator shows labels only
    confidence: NDArray[np.float64] | None  # (batch,); None if the operator shows labels only
    uncertainty: dict[str, NDArray[np.float64]]  # each (batch,); entropies in nats. Empty if it is not shown
    members: NDArray[np.float64] | None  # (members, batch, classes), if requested
    points: NDArray[np.intp] | None = None  # (batch,): which network answered, if the operator shows it
    novelty: dict[str, NDArray[np.float64]] | None = None  # score and percentile, (batch,) each; of calibrated versions
    percentiles: dict[str, NDArray[np.float64]] | None = None  # of each uncertainty measure, (batch,), if requested
    prediction_sets: list[list[int]] | None = None  # classes of each row's set, with `coverage`
    decisions: list[str] | None = None  # "predict" or "abstain", with a risk or costs
    members_used_by_row: NDArray[np.intp] | None = None  # (batch,): members that ran for each row, in `cascade`
    reasons: list[str | None] | None = None  # why to abstain: "uncertain" or "unlike_training"


class Decisions(TypedDict, total=False):
    """Options of a request that concern decisions; they need a calibrated version."""

    rule: Literal["calibrated", "exact"]  # when a row leaves in the mode `cascade`
    coverage: float  # prediction sets that contain the true class with this probability
    set_method: Literal["lac", "aps", "raps"]
    per_class: bool  # the coverage holds for each true class that has enough calibration images
    allow_empty: bool  # sets may be empty
    risk: float  # decide whether to answer: at most this share of the answers is wrong
    wrong_cost: float  # decide by expected cost, together with review_cost
    review_cost: float
    percentiles: bool  # percentile of each uncertainty measure among the calibration images


class Client:
    """Client of one service."""

    def __init__(
        self, url: str = "http://127.0.0.1:3000", *, timeout: float = 30, attempts: int = 5, key: str | None = None
    ):
        """Create a client; it connects with the first request.

        Args:
            url: address of the service.
            timeout: seconds for one attempt.
            attempts: how often a request is sent at most.
            key: API key, where the service needs one.
        """
        self._http = httpx.Client(base_url=url, timeout=timeout, headers=_authorization(key))
        self._attempts = attempts

    def predict(
        self,
        images: Images,
        *,
        ensemble: str | None = None,
        mode: str | None = None,
        members: bool = False,
        **decisions: Unpack[Decisions],
    ) -> Answer:
        """Classify images: an array (batch, C, H, W) in [0, 1], or the bytes of PNG or JPEG files. Or other inputs: features
        (batch, *shape), rows with named fields, a batch of each named field or tensor by name, or texts: strings, or lists of token ids.

        Args:
            images: what to classify.
            ensemble: name of the ensemble that answers (default: that of the service).
            mode: how it answers (default: the first mode that the operator opens).
            members: also return each member's probabilities.
            decisions: prediction sets and abstention; see Decisions.

        Raises:
            RefusedError: the service refused the request, in the last attempt if it was retried.
            httpx.TransportError: the service could not be reached, in the last attempt if it was retried.
        """
        request = _request(images, {"ensemble": ensemble, "mode": mode, "members": members or None, **decisions})
        return _answer(self._send("POST", "/predict", **request))

    def feedback(self, request_id: str, labels: Mapping[int, int] | Sequence[int] | int) -> dict[str, Any]:
        """Report the true classes of the images of an earlier answer.

        Args:
            request_id: of the answer.
            labels: the class of each image in order; or of some of them, by row; or of the only one.

        Returns:
            "accepted", the number of labels that were counted, and "rejected", the others with the reason.

        Raises:
            RefusedError: see predict; also if the service keeps no answers.
        """
        return self._send("POST", "/feedback", json=_labels(request_id, labels))

    def ensembles(self) -> list[dict[str, Any]]:
        """Return the descriptions of the ensembles that are served."""
        return self._send("GET", "/ensembles")["ensembles"]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        def once() -> dict[str, Any]:
            return _read(self._http.request(method, path, **request))

        return tenacity.Retrying(**_policy(self._attempts))(once)


class AsyncClient:
    """Client of one service for asyncio; the methods are those of Client."""

    def __init__(
        self, url: str = "http://127.0.0.1:3000", *, timeout: float = 30, attempts: int = 5, key: str | None = None
    ):
        """See Client."""
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, headers=_authorization(key))
        self._attempts = attempts

    async def predict(
        self,
        images: Images,
        *,
        ensemble: str | None = None,
        mode: str | None = None,
        members: bool = False,
        **decisions: Unpack[Decisions],
    ) -> Answer:
        """See Client.predict."""
        request = _request(images, {"ensemble": ensemble, "mode": mode, "members": members or None, **decisions})
        return _answer(await self._send("POST", "/predict", **request))

    async def feedback(self, request_id: str, labels: Mapping[int, int] | Sequence[int] | int) -> dict[str, Any]:
        """See Client.feedback."""
        return await self._send("POST", "/feedback", json=_labels(request_id, labels))

    async def ensembles(self) -> list[dict[str, Any]]:
        """Return the descriptions of the ensembles that are served."""
        return (await self._send("GET", "/ensembles"))["ensembles"]

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        async def once() -> dict[str, Any]:
            return _read(await self._http.request(method, path, **request))

        return await tenacity.AsyncRetrying(**_policy(self._attempts))(once)


def _authorization(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _labels(request_id: str, labels: Mapping[int, int] | Sequence[int] | int) -> list[dict[str, Any]]:
    by_row = (
        {0: labels} if isinstance(labels, int) else dict(labels if isinstance(labels, Mapping) else enumerate(labels))
    )
    return [{"request_id": request_id, "row": int(row), "label": int(label)} for row, label in by_row.items()]


def _request(images: Images, options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(images, Sequence) and images and all(isinstance(image, bytes) for image in images):
        encoded = [base64.b64encode(image).decode() for image in images]  # pyright: ignore[reportArgumentType]
        return {"json": {"images": encoded, **given}}
    if isinstance(images, Mapping):  # a batch of each named field
        arrays = io.BytesIO()
        with zipfile.ZipFile(arrays, "w") as file:  # as numpy.savez, which reserves some names
            for name, value in images.items():
                with file.open(f"{name}.npy", "w") as entry:
                    np.save(entry, np.asarray(value), allow_pickle=False)
        headers = {"Content-Type": "application/x-npz"}
        return {"content": arrays.getvalue(), "headers": headers, "params": given}
    if isinstance(images, Sequence) and images and all(isinstance(row, Mapping) for row in images):
        return {"json": {"inputs": list(images), **given}}  # named fields
    if isinstance(images, str):
        raise TypeError("images is one text; give a list of texts")
    if isinstance(images, np.ndarray) and images.dtype.kind == "U":
        return {"json": {"texts": images.tolist(), **given}}
    if isinstance(images, Sequence) and images and all(isinstance(text, str) for text in images):
        return {"json": {"texts": list(images), **given}}
    try:
        values = np.asarray(images)
    except ValueError:  # texts of several lengths
        return {"json": {"inputs": [list(text) for text in cast("Any", images)], **given}}
    array = io.BytesIO()
    np.save(array, values if values.dtype.kind in "iu" else values.astype(np.float32), allow_pickle=False)
    return {"content": array.getvalue(), "headers": {"Content-Type": "application/x-npy"}, "params": given}


def _read(response: httpx.Response) -> dict[str, Any]:
    if response.is_success:
        return response.json()
    try:
        message = response.json()["error"]
    except (ValueError, KeyError, TypeError):  # not from the service, but from a proxy in front of it
        message = response.text[:200]
    after = response.headers.get("Retry-After", "")
    raise RefusedError(response.status_code, message, float(after) if after.isdecimal() else None)


def _answer(body: dict[str, Any]) -> Answer:
    rows = body["predictions"]
    members = None
    if "members" in rows[0]:
        members = np.array([row["members"] for row in rows]).transpose(1, 0, 2)
    return Answer(
        ensemble=body["ensemble"],
        version=body["version"],
        mode=body["mode"],
        members_used=body.get("members_used"),
        request_id=body["request_id"],
        labels=np.array([row["label"] for row in rows]),
        class_names=[row["class_name"] for row in rows],
        probs=np.array([row["probs"] for row in rows]) if "probs" in rows[0] else None,
        confidence=np.array([row["confidence"] for row in rows]) if "confidence" in rows[0] else None,
        uncertainty={
            measure: np.array([row["uncertainty"][measure] for row in rows])
            for measure in rows[0].get("uncertainty", {})
        },
        members=members,
        points=np.array([row["point"] for row in rows]) if "point" in rows[0] else None,
        novelty=_columns(rows, "novelty"),
        percentiles=_columns(rows, "percentiles"),
        prediction_sets=[row["prediction_set"] for row in rows] if "prediction_set" in rows[0] else None,
        decisions=[row["decision"] for row in rows] if "decision" in rows[0] else None,
        members_used_by_row=np.array([row["members_used"] for row in rows]) if "members_used" in rows[0] else None,
        reasons=[row["reason"] for row in rows] if "decision" in rows[0] else None,
    )


def _columns(rows: list[dict[str, Any]], field: str) -> dict[str, NDArray[np.float64]] | None:
    if field not in rows[0]:
        return None
    return {name: np.array([row[field][name] for row in rows]) for name in rows[0][field]}


def _policy(attempts: int) -> dict[str, Any]:
    backoff = tenacity.wait_random_exponential(multiplier=0.1, max=5)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, RefusedError) and error.retry_after else 0.0
        return asked + backoff(state)

    return {
        "retry": tenacity.retry_if_exception(_passing),
        "stop": tenacity.stop_after_attempt(attempts),
        "wait": wait,
        "reraise": True,
    }


def _passing(error: BaseException) -> bool:
    # Repeating a prediction is safe, because it changes no state. A read timeout is not retried: a service that is too
    # slow must not get more work.
    lost = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ReadTimeout)
    return lost or (isinstance(error, RefusedError) and error.status in BUSY)
