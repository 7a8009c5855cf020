"""All bad inputs that the service must refuse with 4xx: (description, expected status, bytes of the HTTP request)."""

import base64
import contextlib
import http.client
import io
import json
import pickle
import socket
import struct
import zlib
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from tests.onnx_members import SHAPE


class Bad(NamedTuple):
    what: str
    status: int
    request: bytes
    stall: bool = False  # the rest never arrives: the service has to give up on its own


def message(path, body=b"", content_type=None, method="POST", headers=()):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    lines += [f"Content-Type: {content_type}"] if content_type else []
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def of_json(record, status=400, **options):
    body = record if isinstance(record, bytes) else json.dumps(record).encode()
    return status, message("/predict", body, "application/json", **options)


def of_npy(array, status=400, pickled=False):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return status, message("/predict", stream.getvalue(), "application/x-npy")


def png(width, height, data=None):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = zlib.compress(bytes(1000)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def picture(kind="PNG", size=SHAPE[:0:-1]):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8)).save(stream, kind)
    return stream.getvalue()


def encoded(body, status=400, media_type="image/png", query=""):
    return status, message(f"/predict{query}", body, media_type)


def chunked(body, size=2**16):
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    coded = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"
    return message("/predict", coded, "application/json", headers=["Transfer-Encoding: chunked"])


def requests(*, body_limit, rows_limit, elsewhere):
    """The list of bad requests. `elsewhere` is an address that the service must never fetch."""
    good = np.full((1, *SHAPE), 0.5)
    image = good[0].tolist()
    text = base64.b64encode(picture()).decode()
    large = b'{"inputs": ' + b"0" * body_limit + b"}"
    bomb = png(6000, 6000, zlib.compress(bytes(6001 * 6000)))
    found = {
        "wrong rank": of_json({"inputs": image}),
        "rank 0": of_json({"inputs": 0.5}),
        "wrong shape": of_json({"inputs": np.zeros((1, 3, 9, 9)).tolist()}),
        "ragged": of_json({"inputs": [[[[0.1], [0.1, 0.2]]]]}),
        "ragged depth": of_json({"inputs": [image, 0.5]}),
        "text": of_json({"inputs": np.full((1, *SHAPE), "a").tolist()}),
        "booleans": of_json({"inputs": np.full((1, *SHAPE), True).tolist()}),
        "one long text among numbers": of_json({"inputs": [[[[0.5] * 1000 + ["a" * 5_000_000]]]]}),
        "a truth among numbers": of_json({"inputs": [[[[0.5, True]]]]}),
        "a million unknown fields": of_json({str(i): 0 for i in range(1_000_000)}),
        "a million images that are none": of_json({"images": [1] * 1_000_000}),
        "nulls": of_json({"inputs": np.full((1, *SHAPE), None).tolist()}),
        "NaN": of_json({"inputs": np.full((1, *SHAPE), np.nan).tolist()}),
        "infinity": of_json({"inputs": np.full((1, *SHAPE), np.inf).tolist()}),
        "huge numbers": of_json({"inputs": np.full((1, *SHAPE), 10**400, object).tolist()}),
        "1e999": of_json(json.dumps({"inputs": good.tolist()}).replace("0.5", "1e999").encode()),
        "bytes as pixels": of_json({"inputs": (good * 255).tolist()}),
        "negative": of_json({"inputs": (-good).tolist()}),
        "empty batch": of_json({"inputs": []}),
        "too many rows": of_json({"inputs": [image] * (rows_limit + 1)}, 413),
        "too many images": of_json({"images": [text] * (rows_limit + 1)}, 413),
        "broken JSON": of_json(b'{"inputs": [[['),
        "no JSON at all": of_json(b"\x00\xff\xfe"),
        "empty body": of_json(b""),
        "JSON list": of_json([1]),
        "nested 20 000 deep": of_json(b'{"inputs": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
        "objects nested 900 deep": of_json(b'{"inputs": [' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"]}"),
        "many equal keys": of_json(b"{" + b'"a": 1, ' * 50_000 + b'"inputs": []}'),
        "duplicate field": of_json(json.dumps({"inputs": [image]})[:-1].encode() + b', "inputs": []}'),
        "unknown field": of_json({"inputs": [image], "top_k": 5}),
        "both forms": of_json({"inputs": [image], "images": [text]}),
        "neither form": of_json({"ensemble": "animals"}),
        "unknown ensemble": of_json({"inputs": [image], "ensemble": "nope"}, 404),
        "unknown mode": of_json({"inputs": [image], "mode": "magic"}),
        "members as text": of_json({"inputs": [image], "members": "yes"}),
        "path traversal in a name": of_json({"inputs": [image], "ensemble": "../../etc/passwd"}, 404),
        "NUL in a name": of_json({"inputs": [image], "ensemble": "a\0b"}, 404),
        "a very long name": of_json({"inputs": [image], "ensemble": "a" * 100_000}),
        "path traversal in an address": (404, message("/ensembles/..%2F..%2Fetc%2Fpasswd", method="GET")),
        "path traversal in a query": encoded(picture(), 404, query="?ensemble=" + quote("../secret")),
        "address as image": of_json({"images": [elsewhere]}),
        "address as inputs": of_json({"inputs": elsewhere}),
        "address as body": encoded(elsewhere.encode()),
        "file address as image": of_json({"images": ["file:///etc/passwd"]}),
        "data address as image": of_json({"images": ["data:image/png;base64," + text]}),
        "image of nothing": of_json({"images": [""]}),
        "npy of objects": of_npy(np.array([{"a": 1}], object), pickled=True),
        "npy of text": of_npy(np.full((1, *SHAPE), "a")),
        "npy of NaN": of_npy(good * np.nan),
        "npy of bytes": of_npy((good * 255).astype(np.uint8)),
        "npy of complex": of_npy(good.astype(complex)),
        "npy of rank 0": of_npy(np.float32(0.5)),
        "npy without rows": of_npy(good[:0]),
        "npy of too many rows": of_npy(np.repeat(good, rows_limit + 1, axis=0), 413),
        "npy that claims more": (
            400,
            message(
                "/predict",
                b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 1), }".ljust(118),
                "application/x-npy",
            ),
        ),
        "npy of an absurd shape": (
            400,
            message(
                "/predict",
                b"\x93NUMPY\x01\x00\xd0\x0f"
                + (b"{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + b"f" * 3900 + b",), }").ljust(4048),
                "application/x-npy",
            ),
        ),
        "npz": (400, message("/predict", b"PK\x03\x04" + bytes(100), "application/x-npy")),
        "bare pickle as npy": (400, message("/predict", pickle.dumps([1]), "application/x-npy")),
        "PNG of one column": encoded(png(1, 100_000, zlib.compress(bytes(2 * 100_000)))),
        "JPEG of many scans": encoded(picture("JPEG")[:-2] + b"\xff\xda" * 1000, media_type="Image/JPEG"),
        "truncated PNG": encoded(picture(size=(64, 64))[:-40]),
        "truncated JPEG": encoded(picture("JPEG", (64, 64))[:300], media_type="image/jpeg"),
        "PNG of another size": encoded(picture(size=(9, 9))),
        "PNG of 50 000 × 50 000": encoded(png(50_000, 50_000)),
        "PNG of 6000 × 6000 zeros": encoded(bomb, 413),
        "many PNGs of 3000 × 3000 zeros": of_json(
            {"images": [base64.b64encode(png(3000, 3000, zlib.compress(bytes(3001 * 3000)))).decode()] * 5}, 413
        ),
        "PNG of no size": encoded(png(0, 0)),
        "GIF": encoded(picture("GIF")),
        "empty PNG": encoded(b""),
        "unknown query": encoded(picture(), query="?top_k=5"),
        "query beside JSON": (400, message("/predict?members=true", json.dumps({"inputs": [image]}).encode(), "application/json")),
        "query twice": encoded(picture(), query="?members=true&members=true"),
        "unknown media type": (415, message("/predict", b"x", "text/plain")),
        "no media type": (415, message("/predict", b"x")),
        "BentoML pickle": (
            415,
            message("/predict", pickle.dumps({"inputs": good}), "application/vnd.bentoml+pickle", headers=["Payload-Container: NdarrayContainer"]),
        ),
        "form": (415, message("/predict", b"inputs=1", "application/x-www-form-urlencoded")),
        "multipart": (415, message("/predict", b"--x--", "multipart/form-data; boundary=x")),
        "body over the limit": of_json(large, 413),
        "chunked body over the limit": (413, chunked(large)),
        "Content-Length over the limit, little sent": (
            413,
            message("/predict", b"{}", "application/json", headers=[f"Content-Length: {body_limit + 1}"]),
        ),
        "Content-Length too small": (
            400,
            message("/predict", json.dumps({"inputs": [image]}).encode(), "application/json", headers=["Content-Length: 7"]),
        ),
        "no Content-Length": (
            400,
            message("/predict", b"", "application/json", headers=["Transfer-Encoding: chunked"]) + b"0\r\n\r\n",
        ),
        "wrong method": (405, message("/predict", method="GET")),
        "wrong method on a list": (405, message("/ensembles", method="DELETE")),
        "a slash too many": (404, message("/ensembles/", method="GET")),
        "an address of 20 kB": (414, message("/ensembles/" + "a" * 20_000, method="GET")),
        "a query of 20 kB": encoded(picture(), 414, query="?ensemble=" + "a" * 20_000),
        "unknown address": (404, message("/admin", method="GET")),
        "an address of BentoML's": (404, message("/healthz", method="GET")),
    }  # fmt: skip
    stalled = message("/predict", b'{"inputs"', "application/json", headers=["Content-Length: 1000"])
    return [
        *(Bad(what, status, request) for what, (status, request) in found.items()),
        Bad("Content-Length too large", 408, stalled, stall=True),
    ]


def answer(address, request, timeout=30):
    """Send the bytes and read the response: (status, parsed JSON)."""
    with socket.create_connection(address, timeout) as connection:
        # The request may be refused before all of it was sent; the response can still be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, json.loads(response.read())
