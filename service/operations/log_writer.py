"""Logs that never block a request: lines wait in a bounded queue for a thread that writes them.

The reader of a log may stop, its disk may be full, or its pipe may be closed. None of this may fail or delay a request:
lines that do not fit into the queue, or cannot be written, are dropped and counted.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import io
import json
import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

import orjson

LINES = 10_000  # lines that may wait
TOGETHER = 4096  # bytes per write; writes to a pipe are atomic up to this size, so that lines of workers do not mix
MAX_LINE = 64 * 1024  # bytes; longer lines are cut
DRAIN_SECONDS = 0.5


class LogWriter:
    """Writes lines to a file descriptor in a separate thread."""

    def __init__(self, file: int, lines: int = LINES):
        """Start the thread. At most about `lines` lines wait."""
        self._file = file
        self._lines = lines
        # A SimpleQueue is reentrant: a signal handler may add a line while the interrupted thread is adding one.
        self._waiting: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._torn = False  # True if the last line was written only in part
        self._dropped = 0
        self._count: Callable[[int], None] | None = None
        self._lock = threading.RLock()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, line: bytes) -> None:
        """Queue a line that includes its line break. Returns at once."""
        if self._waiting.qsize() < self._lines:
            self._waiting.put(line if len(line) <= MAX_LINE else line[:MAX_LINE] + b"\n")
        else:
            self._drop(1)

    @property
    def dropped(self) -> int:
        """Number of lines that were dropped."""
        return self._dropped

    def count_with(self, count: Callable[[int], None]) -> None:
        """Call `count` with the number of dropped lines, past ones included. `count` must not log."""
        with self._lock:
            self._count = count
            if self._dropped:
                count(self._dropped)

    def drain(self, seconds: float) -> None:
        """Wait at most `seconds` seconds until all queued lines are written. For the end of the process."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(seconds)

    def _drop(self, lines: int) -> None:
        with self._lock:
            self._dropped += lines
            if self._count is not None:
                self._count(lines)

    def _run(self) -> None:
        while True:
            lines: list[bytes] = []
            size = 0
            awaited: threading.Event | None = None
            with contextlib.suppress(queue.Empty):
                while size < TOGETHER // 2 and awaited is None:
                    found = self._waiting.get(block=not lines)
                    if isinstance(found, bytes):
                        lines.append(found)
                        size += len(found)
                    else:
                        awaited = found
            for together in [b"".join(lines)] if size <= TOGETHER else lines:
                if together and not self._write(together):
                    self._drop(together.count(b"\n"))
            if awaited is not None:
                awaited.set()

    def _write(self, data: bytes) -> bool:
        rest = memoryview(b"\n" + data if self._torn else data)
        while rest:
            try:
                rest = rest[os.write(self._file, rest) :]
                self._torn = bool(rest)
            except BlockingIOError:  # the descriptor was made non-blocking elsewhere
                select.select([], [self._file], [], 1.0)
            except OSError:
                return False
        return True


class LogStream(io.TextIOBase):
    """A text stream on top of a LogWriter, as a replacement for stdout and stderr."""

    def __init__(self, writer: LogWriter):
        self._writer = writer
        self._line = ""
        self._lock = threading.RLock()

    def write(self, text: str, /) -> int:
        """Add text, pass complete lines to the writer, and return the length of the text."""
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._writer.write(("\n".join(lines) + "\n").encode(errors="backslashreplace"))
        return len(text)

    def writable(self) -> bool:
        """Return True."""
        return True

    def flush(self) -> None:
        """Do nothing, because a caller must not wait for the log."""


@functools.cache
def log_writer(file: int) -> LogWriter:
    """Return the writer of this process for stdout (1) or stderr (2)."""
    return LogWriter(file)


def count_with(count: Callable[[int], None]) -> None:
    """Report dropped lines of both writers; see LogWriter.count_with."""
    for file in (1, 2):
        log_writer(file).count_with(count)


def drain() -> None:
    """Wait at most DRAIN_SECONDS for each writer to write its queued lines. For the end of the process."""
    for file in (1, 2):
        log_writer(file).drain(DRAIN_SECONDS)


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, message, process; the traceback of an exception as `exception`.

    Fields given as `extra={"fields": {…}}` are added, such as a request id.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its line break."""
        line: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # text that is not valid Unicode
            return json.dumps(line, default=str)


def take_over(form: Literal["text", "json"] = "text") -> None:
    """Send all logs and prints of this process through LogWriters: the handlers of all loggers, stdout and stderr.

    `form` is how logs are written: as their handlers do, or as JsonLines. Prints stay as they are.
    """
    streams = {file: LogStream(log_writer(file)) for file in (1, 2)}
    atexit.register(drain)
    files = {stream: number for number, stream in ((1, sys.__stdout__), (2, sys.__stderr__)) if stream is not None}
    files |= {sys.stdout: 1, sys.stderr: 2}
    sys.stdout, sys.stderr = streams[1], streams[2]
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        stream: Any = getattr(handler, "stream", None)
        if isinstance(handler, logging.StreamHandler) and stream in files:
            handler.setStream(streams[files[stream]])  # pyright: ignore[reportUnknownMemberType]
            if form == "json":
                handler.setFormatter(JsonLines())
