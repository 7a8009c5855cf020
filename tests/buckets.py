"""A server of Amazon S3's protocol for tests: moto's, in a process of its own, so that it can be stopped and go on."""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
PROGRAM = """
import logging, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class Buckets:
    """The server. `requests` counts what it has answered so far."""

    def __init__(self, log):
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert self._process.stdout is not None, "it is a pipe"
        for line in self._process.stdout:
            if line.startswith("port "):
                self.url = f"http://127.0.0.1:{line.split()[1]}"
                break

    def environment(self, cache):
        """Variables for a process that uses the server."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url, "MODEPATH_CACHE": str(cache)}

    def make(self):
        """Make a bucket and return its name."""
        import boto3

        name = f"bucket-{secrets.token_hex(6)}"
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=self.url, **keys).create_bucket(Bucket=name)
        return name

    @property
    def requests(self):
        """Lines of the server's log, one for each request: 'METHOD /path'."""
        return re.findall(r"([A-Z]+ /\S*) HTTP", self._log.read_text())  # a status other than 200 is coloured

    @contextmanager
    def unreachable(self):
        """Let the server answer nothing for a while."""
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def stop(self):
        """End the server."""
        self._process.kill()
        self._process.communicate()


class Proxy:
    """A proxy before the server that loses answers to PUT requests, or is slow."""

    def __init__(self, upstream, how):
        self.lost = True
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format, *args):  # noqa: A002
                pass

            def _pass_on(self):
                body = b""
                if self.headers.get("transfer-encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")
                }
                headers.setdefault("Content-Type", "application/octet-stream")  # urllib would call it a form
                request = Request(upstream + self.path, body, headers, method=self.command)
                try:
                    answer = urlopen(request)
                except HTTPError as error:
                    answer = error
                content = answer.read()
                if self.command == "PUT" and not proxy.lost:
                    proxy.lost = True
                    if how == "late":
                        time.sleep(2)
                    self.close_connection = True
                    return
                self.send_response_only(answer.status)
                for key, value in answer.headers.items():
                    if key.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(key, value)
                self.end_headers()
                for begin in range(0, len(content), 10_000):
                    self.wfile.write(content[begin : begin + 10_000])
                    if how == "slow" and len(content) > 50_000:
                        time.sleep(0.1)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def lose_next_put(self):
        """The next PUT is carried out, but its answer does not arrive."""
        self.lost = False


@contextmanager
def losing_answers(upstream, how) -> Iterator[Proxy]:
    """A running proxy. `how`: closed (the connection ends without the answer), late (it comes too late), slow (100 kB a second)."""
    proxy = Proxy(upstream, how)
    thread = threading.Thread(target=proxy._server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy._server.shutdown()
        proxy._server.server_close()


@contextmanager
def serving(folder) -> Iterator[Buckets]:
    """A running server; the test is skipped where moto or obstore is not installed."""
    for package in ("moto", "obstore", "boto3"):
        pytest.importorskip(package, reason="object storage is not tested without it")
    server = Buckets(folder / "buckets.log")
    try:
        yield server
    finally:
        server.stop()
