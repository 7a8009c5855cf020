import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from models_store.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def free_port():
    """A port on which no process listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def workers_of(server):
    """psutil processes of a server's workers."""
    psutil = pytest.importorskip("psutil")  # installed with bentoml
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # zombies are not counted
            if "--worker-id" in child.cmdline():
                found.append(child)
    return found


class Server:
    """A real `bentoml serve` process for a store, or for an unpacked bento that contains one."""

    def __init__(self, store, folder, bento=None, output=None, descriptors=None, **environment):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"serve-{port}.log"
        inherited = {name: value for name, value in os.environ.items() if name != "MODELS_STORE"}
        if store is not None:
            inherited["MODELS_STORE"] = str(store.root)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).parent / "bentoml", "serve", *([bento] if bento else [])],
                cwd=folder if bento else ROOT, start_new_session=True,
                stdout=output or log, stderr=output or subprocess.STDOUT,
                preexec_fn=descriptors and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))),
                env={
                    **inherited, "MODEPATH_PORT": str(port), "MODEPATH_POLL_SECONDS": "0.2", "MODEPATH_FEEDBACK": "off",
                    "BENTOML_HOME": str(folder / f"bentoml-{port}"), **environment,
                },
            )  # fmt: skip

    def until(self, status, route="/readyz", seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                answer = httpx.get(self.url + route)
                if answer.status_code == status:
                    return answer
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"no {status} from {route} in time:\n{self.log.read_text()}")

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


@pytest.fixture
def serve(tmp_path):
    servers = []

    def serve(store, **environment):
        servers.append(Server(store, tmp_path, **environment))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()
