"""The pages for people: /ui, and the documentation of the interface at /docs. Nothing on them comes from another host."""

from __future__ import annotations

import importlib.util
import mimetypes
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from service.http.errors import NoRouteError

UI = Path(__file__).parents[1] / "ui"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# Swagger UI sets styles in attributes, and has its icons in the style sheet.
_DOCS_HEADERS = {
    **_HEADERS,
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
}
mimetypes.add_type("text/javascript", ".js")


async def root(request: Request) -> Response:
    """GET /: send people to the page."""
    return RedirectResponse("/ui", 302)


async def page(request: Request) -> Response:
    """GET /ui."""
    return _response(UI / "index.html", _HEADERS)


async def part(request: Request) -> Response:
    """GET /ui/{name}: scripts, styles and the icon."""
    return _response(_known(UI, request.path_params["name"]), _HEADERS)


async def docs(request: Request) -> Response:
    """GET /docs: Swagger UI for /docs.json."""
    return _response(UI / "docs.html", _DOCS_HEADERS)


async def docs_part(request: Request) -> Response:
    """GET /docs/{name}: the files of Swagger UI."""
    return _response(_known(swagger_files(), request.path_params["name"]), _DOCS_HEADERS)


@cache
def swagger_files() -> Path:
    """The folder of Swagger UI 5 (Apache-2.0), which BentoML brings for its own documentation; tested with bentoml 1.4.40."""
    found = importlib.util.find_spec("bentoml")
    assert found is not None, "the service runs in BentoML"
    assert found.origin is not None, "BentoML is a package"
    return Path(found.origin).parent / "_internal" / "server" / "static_content"


def _known(folder: Path, name: str) -> Path:
    if name not in _names(folder):
        raise NoRouteError(f"There is no page {name[:80]!r} here. The pages are /ui and /docs.")
    return folder / name


@cache
def _names(folder: Path) -> frozenset[str]:
    return frozenset(file.name for file in folder.iterdir() if file.suffix in (".js", ".css", ".svg"))


@cache
def _content(file: Path) -> bytes:
    return file.read_bytes()


def _response(file: Path, headers: dict[str, str]) -> Response:
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return Response(_content(file), headers=headers, media_type=kind)
