"""Fault injection: kill a process, or fail a call, at a chosen call into the operating system."""

import contextlib
import errno
import fcntl
import io
import multiprocessing
import os
import signal
import sys
from unittest import mock

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["models_store.store", "tests.onnx_members", "tests.models_store.faults"])

# The calls that change a file. A kill before any other call has the same result as one before the next of these.
CALLS = {"open", "write", "replace", "rename", "mkdir", "rmdir", "unlink", "chmod", "flock"}


def kill_before(call, work, *arguments):
    """Run in a process that is killed before its n-th call, counted from 0. False if it ended before reaching it."""
    process = PROCESSES.Process(target=_killed, args=(call, work, arguments))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def in_processes(*jobs):
    """Run each (work, *arguments) in a separate process, all at the same time; all must succeed."""
    processes = [PROCESSES.Process(target=work, args=arguments) for work, *arguments in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def _killed(call, work, arguments):
    left = [call]

    def before(frame, event, called):
        if event == "c_call" and called.__name__ in CALLS:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    os.fsync = lambda descriptor: None  # killing a process does not change the order of writes to disk
    sys.setprofile(before)
    work(*arguments)
    sys.setprofile(None)


WRITES = [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (fcntl, "flock")]
OPENS = [(os, "open"), (io, "open"), (os, "scandir"), (os, "listdir")]


@contextlib.contextmanager
def failing(call, number, *, lasting):
    """Let the n-th call, and all later ones if `lasting`, fail with error `number`. Yields the list of failed calls.

    A full or read-only disk fails the calls that write; a process without free descriptors fails those that open.
    """
    refused = []
    left = [call]

    def wrapped(function, name):
        def wrapper(*arguments, **named):
            writes = name != "open" or _opens_for_writing(arguments, named)
            if number in (errno.EMFILE, errno.EIO) or writes:
                if left[0] == 0 or (lasting and left[0] < 0):
                    refused.append(name)
                    left[0] -= 1
                    raise OSError(number, os.strerror(number), str(arguments[0]))
                left[0] -= 1
            return function(*arguments, **named)

        return wrapper

    targets = {errno.EMFILE: OPENS, errno.EIO: OPENS + WRITES}.get(number, [*OPENS[:2], *WRITES])
    with contextlib.ExitStack() as stack:
        for module, name in targets:
            stack.enter_context(mock.patch.object(module, name, wrapped(getattr(module, name), name)))
        yield refused


def _opens_for_writing(arguments, named):
    how = arguments[1] if len(arguments) > 1 else named.get("mode", "r")
    return bool(how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(how, int) else set(how) & set("wxa+")
