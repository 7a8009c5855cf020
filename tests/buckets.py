"""A server of Amazon S3's protocol for tests: moto's, in a process of its own, so that it can be stopped and go on."""

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
        return re.findall(r'"([A-Z]+ \S+) HTTP', self._log.read_text())

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
