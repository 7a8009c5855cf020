"""Version numbers. A number is never reused, even if a version or the whole ensemble was removed.

<root>/.numbers/<name>   the last number that was assigned; it survives the removal of the ensemble's folder
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
    """Read a version number, in decimal, from a small file.

    Raises:
        FileNotFoundError, NotADirectoryError: the file does not exist.
        CorruptionError: the file does not hold a version number.
        StoreReadError: the file cannot be read.
    """
    with files.reading(file):
        text = files.read(file, _FILE_BYTES).strip()
    if not NUMBER.fullmatch(text.decode("latin-1")):
        # The message omits the content, which may be anything, because messages are logged.
        raise CorruptionError(f"{file} does not hold the number of a version.")
    return int(text)


def next_number(root: Path, name: str) -> int:
    """A number that no version of `name` has ever had. Requires the publishers' lock of `name`.

    Raises:
        CorruptionError: the record of assigned numbers is damaged, or no number is left.
        StoreReadError: the record cannot be read.
    """
    record = root / RECORDS / name
    try:
        last = read_number(record)
    except (FileNotFoundError, NotADirectoryError):
        last = 0  # no number was assigned yet, or only by a release without this record
    except CorruptionError as error:
        raise CorruptionError(
            f"{error} It records the last version number of {name}. Write the highest one that you know of into it."
        ) from None
    there = [int(entry.name) for entry in (root / name).iterdir() if NUMBER.fullmatch(entry.name)]
    number = max([last, *there]) + 1
    if not NUMBER.fullmatch(str(number)):
        raise CorruptionError(f"{name} has no number left after {number - 1}. Publish under another name.")
    return number


def give_number(root: Path, name: str, number: int) -> None:
    """Record durably that a version is about to get this number. Requires the same lock.

    The recorded number never decreases.
    """
    record = root / RECORDS / name
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        number = max(number, read_number(record))
    files.replace(record, f"{number}\n")
    files.sync(record.parent)
