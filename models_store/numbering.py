"""The numbers of versions. None is given twice, also where a version, or the whole ensemble, was removed since.

<root>/.numbers/<name>   the last number that was given; outside the ensemble's folder, so that it outlives it
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from models_store import files
from models_store.errors import CorruptionError

NUMBER = re.compile(r"[1-9][0-9]{0,17}")
RECORDS = ".numbers"
_FILE_BYTES = 32


def read_number(file: Path) -> int:
    """The number that a small file holds in decimal.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        CorruptionError: it holds something else.
        StoreReadError: it cannot be read.
    """
    with files.reading(file):
        text = files.read(file, _FILE_BYTES).strip()
    if not NUMBER.fullmatch(text.decode("latin-1")):
        # Without what it holds: that may be anything, and messages go into logs.
        raise CorruptionError(f"{file} does not hold the number of a version.")
    return int(text)


def next_number(root: Path, name: str) -> int:
    """A number that no version of `name` ever had. Needs the lock of its publishers.

    Raises:
        CorruptionError: the record of given numbers is damaged, or no number is left.
        StoreReadError: it cannot be read.
    """
    record = root / RECORDS / name
    try:
        last = read_number(record)
    except (FileNotFoundError, NotADirectoryError):
        last = 0  # none was given yet, or by a release that kept no record
    except CorruptionError as error:
        raise CorruptionError(
            f"{error} It keeps the last number that was given to {name}. Write the highest one that you know of into it."
        ) from None
    there = [int(entry.name) for entry in (root / name).iterdir() if NUMBER.fullmatch(entry.name)]
    number = max([last, *there]) + 1
    if not NUMBER.fullmatch(str(number)):
        raise CorruptionError(f"{name} has no number left after {number - 1}. Publish under another name.")
    return number


def give_number(root: Path, name: str, number: int) -> None:
    """Record durably, before it happens, that a version gets this number. What is recorded never falls. Needs the same lock."""
    record = root / RECORDS / name
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        number = max(number, read_number(record))
    files.replace(record, f"{number}\n")
    files.sync(record.parent)
