"""Runs a command: parses the command line into a Config, and reports an error on one line with exit code 2."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import tyro

from models_store.errors import ProviderError, StoreError
from training import log
from training.errors import TrainingError

C = TypeVar("C")


def main(config: type[C], run: Callable[[C], Any], description: str | None) -> NoReturn:
    """Parse, run and exit: with code 0 on success, 2 on an error that the user can correct, 130 when interrupted."""
    log.show()
    try:
        run(tyro.cli(config, description=description, config=(tyro.conf.AvoidSubcommands,)))
    except (TrainingError, StoreError, ProviderError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        _fail(
            f"Cannot write {error.filename or 'a file'}: {error.strerror}. Free space or fix permissions; the same command resumes."
        )
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last finished epoch", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
