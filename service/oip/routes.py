"""The Open Inference Protocol over HTTP, under /v2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.http.bodies import Asked, refuse_coded
from service.http.errors import MediaTypeError, NotReadyError, UnknownEnsembleError
from service.http.intake import Body
from service.inference.opening import Ensemble
from service.inference.policy import TOGETHER
from service.oip import inference, messages
from service.oip.messages import Infer
from service.operations.settings import Settings
from service.predicting import Answered, Asker, Predictor, deadline
from service.worker import Worker

LENGTH = "Inference-Header-Content-Length"
# What a page of another site can send without asking first.
FORMS = ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded")


class Routes:
    """The endpoints of one worker."""

    def __init__(self, chosen: Settings, worker: Worker, predictor: Predictor, asker: Callable[[Request], Asker]):
        self._settings, self._worker, self._predictor, self._asker = chosen, worker, predictor, asker

    def all(self) -> list[Route]:
        """Return all routes."""
        model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        return [
            Route("/v2", self.server, methods=["GET"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            *(Route(path, self.model, methods=["GET"]) for path in (model, version)),
            *(Route(f"{path}/ready", self.model_ready, methods=["GET"]) for path in (model, version)),
            *(Route(f"{path}/infer", self.infer, methods=["POST"]) for path in (model, version)),
        ]

    async def server(self, request: Request) -> Response:
        """GET /v2."""
        return _json(server_metadata())

    async def live(self, request: Request) -> Response:
        """GET /v2/health/live: 200 as long as the process answers."""
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """GET /v2/health/ready: 200 if a request would be answered, else 503."""
        if (why := self._worker.ensembles.why_not_ready()) is not None:
            raise NotReadyError(why)
        return _json({"ready": True})

    async def model(self, request: Request) -> Response:
        """GET /v2/models/{name}: its inputs and outputs."""
        return _json(inference.metadata(self._ensemble(request)))

    async def model_ready(self, request: Request) -> Response:
        """GET /v2/models/{name}/ready: 200 if the ensemble would answer."""
        return _json({"name": self._ensemble(request).manifest.name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """POST /v2/models/{name}/infer."""
        refuse_coded(request.headers.get("content-encoding"))
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type in FORMS or (not media_type and "origin" in request.headers):
            raise MediaTypeError(f"Content-Type {media_type or 'none'!r} is not read here; send application/json.")
        name, version = request.path_params["name"], version_of(request.path_params)
        async with deadline(self._settings.timeout), self._worker.intake.body(request) as body:
            one, who = (
                HttpInfer(body, name, version, request.headers.get(LENGTH), self._worker.limits.rows),
                self._asker(request),
            )
            content = await self._predictor.answer(body, one.read, one.write, who)
        headers = {"X-Request-ID": who.given_id} if who.given_id else {}
        if one.json_bytes == len(content):
            return Response(content, headers=headers, media_type="application/json")
        return Response(
            content, headers={**headers, LENGTH: str(one.json_bytes)}, media_type="application/octet-stream"
        )

    def _ensemble(self, request: Request) -> Ensemble:
        return ensemble_of(self._worker, request.path_params["name"], version_of(request.path_params))


class HttpInfer:
    """One request: what was asked decides how the answer is written."""

    def __init__(self, body: Body, name: str, version: int | None, header_length: str | None, max_rows: int):
        self._body, self._name, self._version, self._header_length = body, name, version, header_length
        self._max_rows = max_rows
        self._request: Infer | None = None
        self.json_bytes = 0  # of the answer

    def read(self, specs: object) -> Asked:
        """Parse the body."""
        self._request = messages.read(self._body.data, self._header_length, self._max_rows)
        return inference.asked(self._request, self._name, self._version)

    def write(self, answered: Answered) -> bytes:
        """Write the answer. Where a network is drawn for each row, blanks make its length independent of its content."""
        assert self._request is not None, "it was read"
        outputs = inference.outputs(answered, self._request.outputs)
        parameters = inference.parameters_of(answered)
        record, raw = messages.write(
            answered.manifest.name, answered.manifest.version, self._request, parameters, outputs
        )
        if answered.mode not in TOGETHER:
            record = record.ljust(messages.most_bytes(answered.manifest.name, self._request, outputs))
        self.json_bytes = len(record)
        return record + raw


def server_metadata() -> dict[str, Any]:
    """The description of the service in the protocol's form."""
    return {"name": "modepath", "version": metadata.version("modepath"), "extensions": ["binary_tensor_data"]}


def version_of(path: Mapping[str, str]) -> int | None:
    """The version that an address names; None if it names none.

    Raises:
        UnknownEnsembleError: it is not a number.
    """
    if (version := path.get("version")) is None:
        return None
    if not version.isascii() or not version.isdecimal():
        raise UnknownEnsembleError(f"{version[:40]!r} is not a version; versions are numbers: 1, 2, …")
    return int(version[:20])


def ensemble_of(worker: Worker, name: str, version: int | None) -> Ensemble:
    """Return the ensemble that answers requests with this name and version.

    Raises:
        UnknownEnsembleError: it is not served, or another version of it is.
    """
    ensemble = worker.ensembles.get(name)
    if version is not None and version != (served := ensemble.manifest.version):
        raise UnknownEnsembleError(f"{name}@{version} is not served; {name}@{served} is.")
    return ensemble


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
