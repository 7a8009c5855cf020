import datetime
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from service.operations import log_writer
from service.operations.log_writer import LogStream, LogWriter


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    # The other end stays open: a writer's thread may still use it, and another test's file could get its number.
    os.close(reader)


def test_lines_come_in_order_and_whole(pipe):
    reader, file = pipe
    writer = LogWriter(file)
    lines = [b"%d %s\n" % (i, b"x" * (i * 37 % 5000)) for i in range(500)]
    received = []

    def read():
        while sum(map(len, received)) < sum(map(len, lines)):
            received.append(os.read(reader, 65536))

    thread = threading.Thread(target=read)
    thread.start()
    for line in lines:
        writer.write(line)
    thread.join(30)
    assert b"".join(received) == b"".join(lines)
    writer.drain(10)
    assert writer.dropped == 0


def test_what_nobody_reads_is_dropped_and_counted_and_never_waited_for(pipe):
    reader, file = pipe
    writer = LogWriter(file, lines=10)
    counted = []
    writer.count_with(counted.append)
    for _ in range(1000):
        writer.write(b"x" * 1000 + b"\n")  # returns, although a pipe holds 64 KiB
    assert writer.dropped > 500
    assert sum(counted) == writer.dropped
    received = b""
    while received.count(b"\n") < 1000 - writer.dropped:
        received += os.read(reader, 65536)
    assert set(received.splitlines()) == {b"x" * 1000}


def test_a_full_disk_drops_lines_until_there_is_room():
    with Path("/dev/full").open("wb", buffering=0) as full:
        writer = LogWriter(full.fileno())
        for _ in range(7):
            writer.write(b"lost\n")
        writer.drain(10)
    assert writer.dropped == 7
    counted = []
    writer.count_with(counted.append)
    assert counted == [7]


def test_a_closed_pipe_drops_lines():
    reader, file = os.pipe()
    os.close(reader)
    writer = LogWriter(file)
    writer.write(b"lost\n")
    writer.drain(10)
    os.close(file)
    assert writer.dropped == 1


def test_a_line_that_was_cut_does_not_spoil_the_next_one(monkeypatch):
    written = io.BytesIO()
    room = [5, 0, None]

    def write(file, data):
        size = room.pop(0) if len(room) > 1 else None
        if size == 0:
            raise OSError(28, "No space left on device")
        return written.write(bytes(data[:size]))

    monkeypatch.setattr(log_writer.os, "write", write)
    writer = LogWriter(1)
    for line in (b'{"first": 1}\n', b'{"second": 2}\n'):
        writer.write(line)
        writer.drain(10)
    assert written.getvalue() == b'{"fir\n{"second": 2}\n'
    assert writer.dropped == 1


def test_draining_ends_although_nobody_reads(pipe):
    writer = LogWriter(pipe[1])
    for _ in range(200):
        writer.write(b"x" * 1000 + b"\n")
    began = time.monotonic()
    writer.drain(0.2)
    assert time.monotonic() - began < 10
    assert os.read(pipe[0], 1)


def test_a_stream_passes_whole_lines_on():
    class Kept:
        lines = ()

        def write(self, line):
            self.lines += (line,)

    kept = Kept()
    stream = LogStream(kept)
    print("a", 1, file=stream)
    stream.write("half")
    stream.write(" a line\nanother\nrest")
    assert kept.lines == (b"a 1\n", b"half a line\nanother\n")


def test_everything_that_a_process_logs_or_prints_goes_through_a_writer():
    code = (
        "import logging, sys\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "from service.operations import log_writer\n"
        "log_writer.take_over()\n"
        "logging.getLogger('a').warning('logged'); print('printed'); print('to stderr', file=sys.stderr)\n"
        "1 / 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "WARNING:a:logged\nprinted\n"
    assert done.stderr.startswith("to stderr\nTraceback")
    assert "ZeroDivisionError" in done.stderr
    blocked, output = os.pipe()
    code = code.replace("print('printed')", "[print('x' * 1000) for _ in range(1000)]").replace("1 / 0", "")
    done = subprocess.run([sys.executable, "-c", code], stdout=output, stderr=subprocess.DEVNULL, timeout=30)
    assert done.returncode == 0  # although no process reads
    os.close(blocked)
    os.close(output)


def test_a_log_in_json_is_one_object_per_record_with_exceptions_and_fields():
    formatter = log_writer.JsonLines()
    try:
        raise ValueError("no\nway")
    except ValueError:
        error = sys.exc_info()
    record = logging.LogRecord("a.b", logging.ERROR, "file", 1, "%s failed\n{}", ("it",), error)
    record.fields = {"request_id": "7"}
    text = formatter.format(record)
    line = json.loads(text)
    assert "\n" not in text
    assert (line["level"], line["logger"], line["message"]) == ("error", "a.b", "it failed\n{}")
    assert line["request_id"] == "7"
    assert "ValueError: no\nway" in line["exception"]
    assert datetime.datetime.fromisoformat(line["time"]).timestamp() == pytest.approx(record.created, abs=1e-3)
    broken = logging.LogRecord("a", logging.INFO, "file", 1, "\ud800", (), None)
    assert json.loads(formatter.format(broken))["level"] == "info"
