"""Which version of each ensemble is served, and in which order ensembles were activated.

<root>/<name>/active     the version that is served
<root>/<name>/.pending   a version to activate once it is published; it remains if the publisher is killed in between
<root>/.activated        names, one per line, in order of their last activation, the latest last
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

from models_store import files
from models_store.errors import CorruptionError, StoreReadError
from models_store.records.numbering import RECORDS, read_number

_ACTIVE, _PENDING, _ORDER = "active", ".pending", ".activated"
_ORDER_BYTES = 2**22
_MISSING = (FileNotFoundError, NotADirectoryError)


class Activations:
    """Reads and writes these files of one store."""

    def __init__(self, root: Path):
        self._root = root

    def active(self, name: str) -> int | None:
        """The version of `name` that is served; None if no version is active.

        Raises:
            CorruptionError: the file `active` does not hold a number.
            StoreReadError: the file cannot be read.
        """
        try:
            return read_number(self._root / name / _ACTIVE)
        except _MISSING:
            return None
        except CorruptionError as error:
            raise CorruptionError(f"{error} Run: python -m models_store activate {name} VERSION") from None

    def token(self, name: str) -> object:
        """A value that changes with each activation; None if nothing is active."""
        try:
            with files.reading(file := self._root / name / _ACTIVE):
                status = file.lstat()
        except _MISSING:
            return None
        return status.st_ino, status.st_mtime_ns

    def order(self, names: Collection[str]) -> list[str]:
        """Those of `names` that were activated, in order of their last activation, the latest last.

        Earlier releases kept no record. Names missing from the record come first, ordered by the modification time of
        their file `active`; a time in the future counts as now.
        """
        now, times = time.time(), dict[str, float]()
        for name in names:
            file = self._root / name / _ACTIVE
            try:
                with files.reading(file):
                    times[name] = min(file.lstat().st_mtime, now)
            except StoreReadError:
                times[name] = 0.0
            except _MISSING:
                continue
        recorded = [name for name in self._recorded() if name in times]
        return sorted(times.keys() - recorded, key=lambda name: (times[name], name)) + recorded

    def pending(self, name: str) -> int | None:
        """The version that was announced but not activated yet; None if there is none.

        Raises:
            StoreReadError: the file `.pending` cannot be read.
        """
        try:
            return read_number(self._root / name / _PENDING)
        except (*_MISSING, CorruptionError):
            return None

    def announce(self, name: str, version: int) -> None:
        """Announce a version to activate after publication. If its publisher is killed, the next one activates it."""
        files.replace(self._root / name / _PENDING, f"{version}\n")
        files.sync(self._root / name)

    def retract(self, name: str) -> None:
        """Remove the announcement of a pending version, if there is one."""
        try:
            (self._root / name / _PENDING).unlink()
        except FileNotFoundError:
            return
        files.sync(self._root / name)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """The lock to hold during any activation; the store has one lock for all names."""
        return files.locked(self._root / RECORDS / ".lock")

    def replace(self, name: str, version: int) -> None:
        """Serve this version from now on. Requires the lock; call `settle` next."""
        files.replace(self._root / name / _ACTIVE, f"{version}\n")

    def remove(self, name: str) -> None:
        """Serve no version of `name` from now on. Requires the lock; call `settle` next."""
        (self._root / name / _ACTIVE).unlink(missing_ok=True)

    def settle(self, name: str, names: Collection[str]) -> None:
        """Make a change durable, and record that `name` was activated last, if it is active. `names` are all published
        names.
        """
        files.sync(self._root / name)
        active = self.token(name) is not None
        order = [other for other in self.order(names) if other != name] + [name] * active
        if order != self._recorded():
            files.replace(self._root / _ORDER, "".join(f"{one}\n" for one in order))
            files.sync(self._root)
        # Keep the announcement of a version that is not published yet: its publisher will activate it.
        if (pending := self.pending(name)) is None or (self._root / name / str(pending)).exists():
            self.retract(name)

    def _recorded(self) -> list[str]:
        file = self._root / _ORDER
        try:
            with files.reading(file):
                return list(dict.fromkeys(files.read(file, _ORDER_BYTES).decode().split()))
        # The record only determines a default, and the next activation rewrites it.
        except (*_MISSING, CorruptionError, UnicodeDecodeError):
            return []
