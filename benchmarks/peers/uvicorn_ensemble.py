"""An ensemble of ONNX files as a good engineer serves it in an hour: uvicorn, orjson, one queue whose waiting images run together.

    MEMBERS=folder/of/onnx/files PORT=3300 uvicorn benchmarks.peers.uvicorn_ensemble:app --port 3300 --no-access-log

Reads {"inputs": …} or an array of numpy.save; answers {"probs": [[…]]}. There are no checks of the input, limits, metrics or errors. Uses
nothing of ours.
"""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson

from benchmarks.peers.members import Members

MOST_ROWS = 64
members = Members()
waiting: list[tuple[np.ndarray, asyncio.Future]] = []
runner = ThreadPoolExecutor(1)
running: set[asyncio.Task] = set()


async def run() -> None:
    """Run what waits until nothing waits."""
    while waiting:
        taken, rows = [], 0
        while waiting and (not taken or rows + len(waiting[0][0]) <= MOST_ROWS):
            taken.append(waiting.pop(0))
            rows += len(taken[-1][0])
        images = np.concatenate([images for images, _ in taken])
        probs = await asyncio.get_running_loop().run_in_executor(runner, members.probs, images)
        start = 0
        for images, future in taken:
            future.set_result(probs[start : start + len(images)])
            start += len(images)


async def app(scope, receive, send):
    """The ASGI application."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = dict(scope["headers"])
    if headers.get(b"content-type") == b"application/x-npy":
        images = np.load(io.BytesIO(body))
    else:
        images = np.array(orjson.loads(body)["inputs"], np.float32)
    future = asyncio.get_running_loop().create_future()
    waiting.append((images, future))
    if not running:
        task = asyncio.ensure_future(run())
        running.add(task)
        task.add_done_callback(running.discard)
    probs = await future
    answer = orjson.dumps({"probs": probs}, option=orjson.OPT_SERIALIZE_NUMPY)
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": answer})
