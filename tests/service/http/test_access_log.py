import asyncio
import json

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from service.http.access_log import MAX_FIELD, AccessLog
from service.operations.log_writer import log_writer


async def answer(request):
    request.scope["log_fields"] |= {"rows": 3, "ensemble": "e" * 10_000}
    return PlainTextResponse("hello", 202)


def test_a_request_is_one_json_line_whatever_its_path_holds(capfd):
    async def go():
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b""}

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/a",
            "headers": [],
            "query_string": b"",
            "client": ("::1", 5),
        }
        app = AccessLog(Starlette(routes=[Route("/a", answer)]))
        await app(scope, receive, send)
        await app({**scope, "path": '/a\n{"status": 200}'}, receive, send)
        await app({**scope, "path": "/é" * 5000, "method": "M" * 5000, "client": ("9" * 5000, 1)}, receive, send)

    asyncio.run(go())
    log_writer(1).drain(30)
    lines = capfd.readouterr().out.splitlines()
    first, second, _ = map(json.loads, lines)
    assert max(map(len, lines)) < 6 * MAX_FIELD
    assert (first["method"], first["path"], first["status"], first["bytes"]) == ("GET", "/a", 202, 5)
    assert (first["rows"], first["client"]) == (3, "::1")
    assert first["seconds"] >= 0
    assert (second["path"], second["status"]) == ('/a\n{"status": 200}', 404)
