"""Runs a command: parses the command line into a Config, and reports an error on one line with exit code 2."""

from __future__ import annotations

import errno
import logging
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import tyro
from tqdm.auto import tqdm

from models_store.errors import ProviderError, StoreError
from training import logger
from training.errors import TrainingError

C = TypeVar("C")
TERMINATED = 128 + signal.SIGTERM  # the exit code that a shell reports for it, too


def main(config: type[C], run: Callable[[C], Any], description: str | None) -> NoReturn:
    """Parse, run and exit: with code 0 on success, 2 on an error that the user can correct, 130 when interrupted, 143 on SIGTERM."""
    show_log()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(tyro.cli(config, description=description, config=(tyro.conf.AvoidSubcommands,)))
    except (TrainingError, StoreError, ProviderError) as error:
        _fail(str(error))
    except torch.OutOfMemoryError as error:
        _fail(
            f"The memory of the GPU does not suffice: {str(error).split('. ')[0]}. Give a smaller --batch-size, or --accumulate 2 or more."
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        _fail(
            f"Cannot write {error.filename or 'a file'}: {error.strerror}. Free space or fix permissions; the same command resumes."
        )
    except (KeyboardInterrupt, _TerminatedError) as stopped:
        told = "stopped by SIGTERM" if isinstance(stopped, _TerminatedError) else "interrupted"
        print(f"{told}; the same command resumes from the last finished epoch", file=sys.stderr)
        sys.exit(TERMINATED if isinstance(stopped, _TerminatedError) else 130)
    sys.exit(0)


class _TerminatedError(BaseException):
    """SIGTERM arrived, as on a machine that is about to be taken away. Not an Exception, which code on the way may catch."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _TerminatedError


def show_log() -> None:
    """Show the log of training on standard output, unless this program has configured logging itself."""
    if logger.hasHandlers():
        return
    handler = _AboveBars()
    handler.setFormatter(_Marked())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class _AboveBars(logging.Handler):
    """Writes to standard output without breaking progress bars, in a terminal and in a notebook."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record))
        except OSError:  # for example a closed pipe: the command ends, as it would after print()
            raise
        except Exception:
            self.handleError(record)


class _Marked(logging.Formatter):
    """The message; warnings and errors are marked as such."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
