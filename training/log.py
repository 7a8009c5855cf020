"""The log of training: one logger, `modepath`, whose records carry a level and the rank of their process.

A command shows it on standard output. A program that configures logging itself gets the same records in its handlers.
"""

from __future__ import annotations

import logging

from torch import distributed
from tqdm.auto import tqdm

logger = logging.getLogger("modepath")


class _OneRank(logging.Filter):
    """Sets `record.rank`. All processes of a training log the same lines, so others than the first log errors only."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        record.__dict__["rank"] = rank
        return rank == 0 or record.levelno >= logging.ERROR


class _AboveBars(logging.Handler):
    """Writes to standard output without breaking progress bars, in a terminal and in a notebook."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record))
        except BrokenPipeError:
            raise
        except Exception:
            self.handleError(record)


class _Level(logging.Formatter):
    """The message; a warning or an error is marked as such."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


logger.addFilter(_OneRank())


def show() -> None:
    """Show the log on standard output, unless this program has configured logging itself."""
    if logger.hasHandlers():
        return
    handler = _AboveBars()
    handler.setFormatter(_Level())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
