"""What honest clients notice while hostile ones do their worst from eight connections: `python -m benchmarks.serving.bad_input --attack`.

Each attack runs in a process of its own, as `python -m benchmarks.serving.hostile ATTACK HOST PORT SECONDS`.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator

CONNECTIONS = 8
LIMIT = 16 * 2**20  # of a body
SIDE = 4096
Step = Callable[[socket.socket, int], None]  # what one connection does, again and again


def main() -> None:
    attack, host, port, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    deadline = time.monotonic() + seconds
    counts = [0] * CONNECTIONS
    steps = ATTACKS[attack]()

    def run(number: int) -> None:
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((host, port), 10) as connection:
                next(steps)(connection, number)
            counts[number] += 1

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline + 15 - time.monotonic()))
    print(json.dumps({"attempts": sum(counts)}))


def head(media_type: str, size: int) -> bytes:
    """Of a POST to /predict."""
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media_type}\r\nContent-Length: {size}\r\n\r\n".encode()


def _send(media_type: str, body: bytes, *, wait: bool = True) -> Step:
    def step(connection: socket.socket, number: int) -> None:
        connection.sendall(head(media_type, len(body)) + body)
        if wait:
            connection.recv(1000)

    return step


def json_bodies() -> Iterator[Step]:
    """16 MB that cost a parser seconds: lists in lists, empty lists, closing brackets, equal keys, many texts, numbers without end."""
    empty, nested = b"[],", b"[[]],"
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode().encode()
    bodies = [
        b'{"inputs": [' + nested * (LIMIT // len(nested) - 10) + b"[[]]]}",
        b'{"inputs": [' + empty * (LIMIT // len(empty) - 10) + b"[]]}",
        b"{" + b'"a":1,' * (LIMIT // 6 - 10) + b'"inputs": []}',
        b'{"images": [' + (b'"' + png + b'",') * (LIMIT // (len(png) + 3) - 10) + b'""]}',
        b'{"inputs": [[[[' + b"0," * (LIMIT // 2 - 50) + b"0]]]]}",
        b'{"inputs": ' + b"[" * (LIMIT // 2 - 50) + b"]" * (LIMIT // 2 - 50) + b"}",
        b'{"inputs": [' + b"]" * (LIMIT - 50),
    ]
    # As many right images as a request may have, with long numbers: dear, and to be answered.
    row = b"[[" + b",".join([b"[" + b",".join([b"0.12345678901234567"] * 28) + b"]"] * 28) + b"]]"
    bodies.append(b'{"inputs": [' + b",".join([row] * (LIMIT // (len(row) + 1) - 1)) + b"]}")
    return itertools.cycle([_send("application/json", body) for body in bodies])


def silent_bodies() -> Iterator[Step]:
    """16 MB at once but for the last byte, then silence."""

    def step(connection: socket.socket, number: int) -> None:
        connection.settimeout(120)
        connection.sendall(head("application/x-npy", LIMIT) + bytes(LIMIT - 1))
        connection.recv(1000)

    return itertools.repeat(step)


def heads() -> Iterator[Step]:
    """150 MB of header lines, 50 MB in one header, and connections that say nothing."""

    def lines(connection: socket.socket, number: int) -> None:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(150):
            connection.sendall(b"a:\r\n" * 2**18)
        connection.sendall(b"\r\n")
        connection.recv(1000)

    def one(connection: socket.socket, number: int) -> None:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ")
        for _ in range(50):
            connection.sendall(b"a" * 2**20)
        connection.sendall(b"\r\n\r\n")
        connection.recv(1000)

    def idle(connection: socket.socket, number: int) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for _ in range(1010 // CONNECTIONS):
                stack.enter_context(socket.create_connection(connection.getpeername(), 10))
            time.sleep(2)

    return itertools.cycle([lines, one, idle])


def unread() -> Iterator[Step]:
    """Eight requests at once for large answers that are never read, and trailers of 50 MB."""
    body = b"[" + b",".join([b"[" + b",".join([b"0.5"] * 28) + b"]"] * 28) + b"]"
    rows = (
        b'{"members": true, "inputs": [' + b",".join([b"[" + body + b"]"] * 18) + b"]}"
    )  # below 64 KiB, so that eight may wait

    def asks(connection: socket.socket, number: int) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        for _ in range(200):
            connection.sendall((head("application/json", len(rows)) + rows) * 8)

    def trailers(connection: socket.socket, number: int) -> None:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\n{}\r\n0\r\nX: "
        )
        for _ in range(50):
            connection.sendall(b"a" * 2**20)

    return itertools.cycle([asks, trailers])


def large_images() -> Iterator[Step]:
    """Interlaced 16-bit PNGs of 16 million pixels in 100 kB; half of the clients leave at once."""
    body = interlaced_png(SIDE)
    return itertools.cycle([_send("image/png", body), _send("image/png", body, wait=False)])


def tiny_images() -> Iterator[Step]:
    """Images of one pixel, a thousand in a request: what they decode to is much larger than what was sent."""
    png = base64.b64encode(interlaced_png(1))
    body = b'{"images": [' + b",".join([b'"' + png + b'"'] * 1000) + b"]}"
    return itertools.cycle([_send("application/json", body), _send("application/json", body, wait=False)])


def interlaced_png(side: int) -> bytes:
    """A black square, RGB with 16 bits, in seven passes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    size = sum((1 + 6 * len(range(x, side, dx))) * len(range(y, side, dy)) for x, y, dx, dy in passes)
    header = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 1)
    packed = zlib.compress(bytes(size), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


ATTACKS: dict[str, Callable[[], Iterator[Step]]] = {
    "costly JSON": json_bodies,
    "silent bodies": silent_bodies,
    "endless heads and idle connections": heads,
    "large images": large_images,
    "unread answers and endless trailers": unread,
    "many tiny images": tiny_images,
}

if __name__ == "__main__":
    main()
