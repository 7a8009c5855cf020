"""From a fresh clone to the first answer, and the second start: seconds, installation included.

    python -m benchmarks.serving.first_serve

Clones this repository's HEAD into a temporary folder with an empty home, runs `make serve` there, asks, stops it with Ctrl-C's
signal, and does so again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from tabulate import tabulate

PORT = 3741


def main() -> None:
    digits = load_digits()
    held_out = np.random.default_rng(0).permutation(len(digits.target))[:360]  # the test split of `digits`
    body = json.dumps({"inputs": (digits.images[held_out[:1]] / 16)[:, None].tolist()}).encode()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder) / "clone", Path(folder) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", Path(__file__).parents[2], clone], check=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MODE", "BENTOML", "VIRTUAL_ENV"))}
        environment |= {"HOME": str(home), "MODEPATH_PORT": str(PORT)}
        for start in ("first", "second"):
            began = time.monotonic()
            with (Path(folder) / f"{start}.log").open("w") as log:
                server = subprocess.Popen(
                    ["make", "serve"], cwd=clone, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            answer = ask(body, server)
            rows.append([start, f"{time.monotonic() - began:.1f}", answer == digits.target[held_out[0]]])
            os.killpg(server.pid, signal.SIGINT)
            server.wait(30)
    print(tabulate(rows, ["start", "seconds to the answer", "right"], tablefmt="github", disable_numparse=True))


def ask(body: bytes, server: subprocess.Popen) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/predict", body, {"Content-Type": "application/json"})
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)["predictions"][0]["label"]
        except OSError:  # not listening yet, or 503
            time.sleep(0.2)
    raise SystemExit("make serve ended before it answered")


if __name__ == "__main__":
    main()
