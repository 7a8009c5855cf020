"""Admits requests by their API key: before a body is read, and before a route is looked up.

/livez, /readyz, /v2/health/...              no key
POST /predict, POST /ensembles/{name}/path   predict
POST /v2/models/.../infer                    predict
POST /feedback                               feedback
POST /ensembles/{name}/activate              admin
any  /ensembles/{name}/rollout               admin
everything else                              read
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable

from starlette.types import Scope as Request

from service.access.keys import Key, Keys, Scope
from service.access.quota import Quota
from service.http.errors import BusyError, ForbiddenError, QuotaError, TooLargeError, UnauthorizedError
from service.operations.shared import LockedError

OPEN = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
KEY = "modepath.key"  # where the scope of a request has its key
_SCOPES: tuple[tuple[re.Pattern[str], Scope], ...] = (
    (re.compile(r"POST /predict"), "predict"),
    (re.compile(r"POST /ensembles/[^/]+/path"), "predict"),
    (re.compile(r"POST /v2/models/[^/]+(/versions/[^/]+)?/infer"), "predict"),
    (re.compile(r"POST /feedback"), "feedback"),
    (re.compile(r"POST /ensembles/[^/]+/activate"), "admin"),
    (re.compile(r"[A-Z]+ /ensembles/[^/]+/rollout"), "admin"),
)


class Guard:
    """The keys and quotas of one worker."""

    def __init__(self, keys: Keys, quota: Quota):
        self._keys = keys
        self._quota = quota

    def admit(self, request: Request) -> None:
        """Find the key of a request, and keep it in the request's scope.

        Raises:
            UnauthorizedError: without a key, or with an unknown or revoked one.
            ForbiddenError: the key has another scope.
            QuotaError: the key has used its quota up.
        """
        if request["path"] in OPEN:
            return
        given = _given(request["headers"])
        key = self._keys.find(given) if given is not None else None
        if key is None:
            raise UnauthorizedError(
                "This service needs an API key: send the header `Authorization: Bearer KEY`. Its operator makes keys."
                if given is None
                else "The API key is not known here, or was revoked. Ask the operator for a new one.",
                page="text/html" in _header(request["headers"], b"accept"),
            )
        needed = needed_by(request["method"], request["path"])
        if not key.may(needed):
            raise ForbiddenError(
                f"The key {key.name} ({key.id}) has the scope {', '.join(key.scopes)}; this request needs {needed}. Ask the operator for another key."
            )
        if needed == "predict":
            self._take(key, 0)
        request[KEY] = key

    def charge(self, key: Key | None, rows: int) -> None:
        """Take rows out of a key's quota; negative ones are given back.

        Raises:
            TooLargeError: more than the quota of a whole minute.
            QuotaError: the quota is used up.
        """
        if key is None or key.rows_per_minute is None:
            return
        if rows > key.rows_per_minute:
            raise TooLargeError(
                f"{rows} rows in one request; the key {key.name} may ask {key.rows_per_minute} a minute. Send them in parts."
            )
        self._take(key, rows)

    def _take(self, key: Key, rows: int) -> None:
        if key.rows_per_minute is None:
            return
        try:
            seconds = self._quota.take(key.id, rows, key.rows_per_minute)
        except LockedError:
            raise BusyError("The service cannot count rows at the moment. Try again in a second.") from None
        if seconds and rows >= 0:
            raise QuotaError(
                f"The key {key.name} may ask {key.rows_per_minute} rows a minute, and has used them up. Try again in {math.ceil(seconds)} s.",
                math.ceil(seconds),
            )


def needed_by(method: str, path: str) -> Scope:
    """The scope that a request needs."""
    asked = f"{method} {path}"
    for pattern, scope in _SCOPES:
        if pattern.fullmatch(asked):
            return scope
    # Whatever else changes something is closed, should a route be added here and forgotten above.
    return "read" if method in ("GET", "HEAD", "OPTIONS") else "admin"


def _given(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key in the header Authorization: as a bearer token, or as the password that a browser asks for."""
    kind, _, value = _header(headers, b"authorization").partition(" ")
    if kind.lower() == "bearer":
        return value.strip() or None
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in headers if key == name), "")
