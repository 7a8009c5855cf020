"""Logs that never hold anybody up: lines wait in a bounded queue for a thread that writes them.

A log's reader may stop, its disk may be full, its pipe may be closed. None of that may cost a request: what the queue does not
hold, and what cannot be written, is dropped and counted.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Callable
from typing import Any

LINES = 10_000  # that wait at most
TOGETHER = 4096  # bytes in one write: so many a pipe takes whole, so that lines of several workers do not mix
MAX_LINE = 64 * 1024
DRAIN_SECONDS = 0.5


class LogWriter:
    """Writes lines to a file descriptor from a thread of its own."""

    def __init__(self, file: int, lines: int = LINES):
        """Begin. At most `lines` wait, or a few more."""
        self._file = file
        self._lines = lines
        # One that may be filled from a signal handler, while the same thread is filling it.
        self._waiting: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._torn = False  # the last line was written in part
        self._dropped = 0
        self._count: Callable[[int], None] | None = None
        self._lock = threading.RLock()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, line: bytes) -> None:
        """Add a line, with its end. Returns at once."""
        if self._waiting.qsize() < self._lines:
            self._waiting.put(line if len(line) <= MAX_LINE else line[:MAX_LINE] + b"\n")
        else:
            self._drop(1)

    @property
    def dropped(self) -> int:
        """How many lines were lost."""
        return self._dropped

    def count_with(self, count: Callable[[int], None]) -> None:
        """Report lines that are dropped, those until now included. `count` must not log."""
        with self._lock:
            self._count = count
            if self._dropped:
                count(self._dropped)

    def drain(self, seconds: float) -> None:
        """Before the process ends: wait for what is waiting, but not longer."""
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
            except BlockingIOError:  # somebody else made it non-blocking
                select.select([], [self._file], [], 1.0)
            except OSError:
                return False
        return True


class LogStream(io.TextIOBase):
    """A text stream over a LogWriter, in place of stdout and stderr."""

    def __init__(self, writer: LogWriter):
        self._writer = writer
        self._line = ""
        self._lock = threading.RLock()

    def write(self, text: str, /) -> int:
        """Add text; whole lines go on."""
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._writer.write(("\n".join(lines) + "\n").encode(errors="backslashreplace"))
        return len(text)

    def writable(self) -> bool:
        """Yes."""
        return True

    def flush(self) -> None:
        """Returns at once: nothing here waits for a log."""


@functools.cache
def log_writer(file: int) -> LogWriter:
    """The process's writer to stdout (1), or to stderr (2)."""
    return LogWriter(file)


def count_with(count: Callable[[int], None]) -> None:
    """Report all lines that are dropped; see LogWriter."""
    for file in (1, 2):
        log_writer(file).count_with(count)


def drain() -> None:
    """Before the process ends: wait for what is waiting, for a moment."""
    for file in (1, 2):
        log_writer(file).drain(DRAIN_SECONDS)


def take_over() -> None:
    """Let everything that this process logs or prints go through threads: the handlers of all loggers, stdout and stderr."""
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
