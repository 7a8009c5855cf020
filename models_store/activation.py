"""Which version of each ensemble is served, and in which order ensembles were activated.

<root>/<name>/active     the version that is served
<root>/<name>/.pending   a version that is to be activated once it is published; it outlives a publisher that is killed in between
<root>/.activated        names, one a line, the one that was activated last at the end
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

from models_store import files
from models_store.errors import CorruptionError, StoreReadError
from models_store.numbering import RECORDS, read_number

_ACTIVE, _PENDING, _ORDER = "active", ".pending", ".activated"
_ORDER_BYTES = 2**22
_MISSING = (FileNotFoundError, NotADirectoryError)


class Activations:
    """The files above, of the store in one folder."""

    def __init__(self, root: Path):
        self._root = root

    def active(self, name: str) -> int | None:
        """The version that is served, if there is one.

        Raises:
            CorruptionError: `active` holds something else than a number.
            StoreReadError: it cannot be read.
        """
        try:
            return read_number(self._root / name / _ACTIVE)
        except _MISSING:
            return None
        except CorruptionError as error:
            raise CorruptionError(f"{error} Run: python -m models_store activate {name} VERSION") from None

    def token(self, name: str) -> object:
        """Something that is another after each activation; None where nothing is active."""
        try:
            with files.reading(file := self._root / name / _ACTIVE):
                status = file.lstat()
        except _MISSING:
            return None
        return status.st_ino, status.st_mtime_ns

    def order(self, names: Collection[str]) -> list[str]:
        """Those of the names that were activated, the last one at the end.

        Earlier releases kept no record. Names that it lacks come first, by the time of `active`; one in the future counts as now.
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
        """The version that was announced and is still to be activated, if there is one.

        Raises:
            StoreReadError: it cannot be read.
        """
        try:
            return read_number(self._root / name / _PENDING)
        except (*_MISSING, CorruptionError):
            return None

    def announce(self, name: str, version: int) -> None:
        """Have a version activated once it is published: by its publisher, or where that is killed by the next one."""
        files.replace(self._root / name / _PENDING, f"{version}\n")
        files.sync(self._root / name)

    def retract(self, name: str) -> None:
        """Nothing is pending any more."""
        try:
            (self._root / name / _PENDING).unlink()
        except FileNotFoundError:
            return
        files.sync(self._root / name)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """To be held while something is activated, whatever its name."""
        return files.locked(self._root / RECORDS / ".lock")

    def replace(self, name: str, version: int) -> None:
        """Serve this version from now on. Needs the lock; `settle` comes next."""
        files.replace(self._root / name / _ACTIVE, f"{version}\n")

    def settle(self, name: str, names: Collection[str]) -> None:
        """Make it durable, and record that `name`, of all published names, was activated last."""
        files.sync(self._root / name)
        order = [other for other in self.order(names) if other != name] + [name]
        if order != self._recorded():
            files.replace(self._root / _ORDER, "".join(f"{one}\n" for one in order))
            files.sync(self._root)
        # An announced version that is not published yet is still to be activated by its publisher.
        if (pending := self.pending(name)) is None or (self._root / name / str(pending)).exists():
            self.retract(name)

    def _recorded(self) -> list[str]:
        file = self._root / _ORDER
        try:
            with files.reading(file):
                return list(dict.fromkeys(files.read(file, _ORDER_BYTES).decode().split()))
        # It decides no more than a default, and the next activation writes it anew.
        except (*_MISSING, CorruptionError, UnicodeDecodeError):
            return []
