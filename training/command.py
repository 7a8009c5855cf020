"""From the command line to a Config, and from an error to one line and exit code 2."""

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
    """Parse, run, exit: 0 when done, 2 when something the user can mend is wrong, 130 when interrupted."""
    log.show()
    try:
        run(tyro.cli(config, description=description, config=(tyro.conf.AvoidSubcommands,)))
    except (TrainingError, StoreError, ProviderError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        _fail(
            f"Cannot write {error.filename or 'a file'}: {error.strerror}. Free space or fix permissions; the same command goes on."
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
