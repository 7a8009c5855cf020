"""The files that hold the metrics of several workers: one per worker and kind of metric. The scraped process sums them
up.

The files have the format of prometheus_client's multiprocess mode. The library's own files are sparse and
memory-mapped: on a full file system, a write to one kills the process with SIGBUS, without a message. Here the blocks
of a file are allocated before it is mapped. If that fails, or if the file is removed, a worker continues in its memory,
and returns to a file when there is space.

Tested with prometheus_client 0.21.1 and 0.26.0. This module uses `values.ValueClass`, `mmap_dict.mmap_key`, and
`multiprocess.MultiProcessCollector._accumulate_metrics`, none of which is a documented interface.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import Metric, multiprocess
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.mmap_dict import mmap_key
from prometheus_client.registry import Collector

CAPACITY = 64 * 1024
SUFFIX = ".db"
ARCHIVE = "archive"
LOCK = "lock"
LOCK_SECONDS = 1.0
KINDS = ("counter", "histogram")  # kinds whose values may be summed
_HEADER = 8
_used = struct.Struct("i")
_number = struct.Struct("d")
_lock = threading.Lock()
_own: dict[str, Pages] = {}  # by kind

Values = dict[str, float]  # by the key that prometheus_client builds from a metric's name and labels


class Pages:
    """The values of one process and kind, in a memory-mapped file if possible, else in memory. Not thread-safe."""

    def __init__(self, path: Path):
        """Values in an existing file are kept: a new process may have the process id of a dead one."""
        self.path = path
        self._capacity = CAPACITY
        self._map = mmap.mmap(-1, CAPACITY)
        self._end = _HEADER
        self._positions: dict[str, int] = {}
        self._inode: tuple[int, int] | None = None
        self._map[:4] = _used.pack(_HEADER)
        for key, value in read(path).items():
            self.write(self.position(key), value)
        self.look()

    @property
    def in_file(self) -> bool:
        """True if other processes can read the values."""
        return self._inode is not None

    def position(self, key: str) -> int:
        """Return the position of a key's value; a new key gets the value 0."""
        if (found := self._positions.get(key)) is not None:
            return found
        entry = _entry(key, 0.0)
        if self._end + len(entry) > self._capacity:
            self._grow()
        self._map[self._end : self._end + len(entry)] = entry
        self._end += len(entry)
        self._positions[key] = self._end - 16
        self._map[:4] = _used.pack(self._end)  # written last, so that readers see complete entries only
        return self._positions[key]

    def read(self, position: int) -> float:
        """Return the value at a position."""
        return _number.unpack_from(self._map, position)[0]

    def write(self, position: int, value: float) -> None:
        """Set the value at a position. By assignment: pack_into would write zeros first, which others could read."""
        self._map[position : position + 8] = _number.pack(value)

    def values(self) -> Values:
        """Return all values by key."""
        return {key: self.read(position) for key, position in self._positions.items()}

    def look(self) -> None:
        """Create the file if it is missing or was removed; if that fails, continue in memory."""
        if not self.is_there():
            self._inode = None
            with contextlib.suppress(OSError):
                self._move_into_file()

    def is_there(self) -> bool:
        """Return whether other processes can still read the values: the file may have been removed."""
        with contextlib.suppress(OSError):
            return self._inode is not None and _inode(self.path.stat()) == self._inode
        return False

    def close(self) -> None:
        """Release the memory."""
        self._map.close()

    def _grow(self) -> None:
        larger = mmap.mmap(-1, 2 * self._capacity)
        larger[: self._capacity] = self._map[:]
        self._map, self._capacity, self._inode = larger, 2 * self._capacity, None
        self.look()

    def _move_into_file(self) -> None:
        _own_folder(self.path.parent)
        begun = self.path.with_suffix(".new")  # renamed when it is complete
        file = os.open(begun, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _allocate(file, self._capacity)
            mapped = mmap.mmap(file, self._capacity)
            mapped[:] = self._map[:]
            begun.rename(self.path)
            self._inode = _inode(os.fstat(file))
        except OSError:
            begun.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        self._map = mapped


class Value:
    """One value of a metric; replaces prometheus_client's `ValueClass`."""

    _multiprocess = True

    def __init__(
        self,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: list[str],
        labelvalues: list[str],
        help_text: str,
        multiprocess_mode: str = "",
        **_: Any,
    ):
        kind = f"{typ}_{multiprocess_mode}" if multiprocess_mode else typ
        with _lock:
            if kind not in _own:
                folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
                _own[kind] = Pages(folder / f"{kind}_{os.getpid()}{SUFFIX}")
            self._pages = _own[kind]
            self._position = self._pages.position(mmap_key(metric_name, name, labelnames, labelvalues, help_text))
            self._value = self._pages.read(self._position)

    def inc(self, amount: float) -> None:
        """Add to the value."""
        with _lock:
            self._value += amount
            self._pages.write(self._position, self._value)

    def set(self, value: float, timestamp: float | None = None) -> None:
        """Set the value."""
        with _lock:
            self._value = value
            self._pages.write(self._position, value)

    def get(self) -> float:
        """Return the value."""
        return self._value

    def set_exemplar(self, exemplar: Any) -> None:
        """Do nothing: the files hold no exemplars."""

    def get_exemplar(self) -> None:
        """Do nothing: the files hold no exemplars."""


def look() -> bool:
    """Create missing files, and return False if some values are only in this process's memory.

    Called in each worker, periodically.
    """
    for pages in list(_own.values()):
        if not pages.is_there():  # checked without the lock, because a slow disk must not block requests
            with _lock:
                pages.look()
    return all(pages.in_file for pages in list(_own.values()))


class Sum(Collector):
    """Collects the metrics of all workers, living and dead. The values of this process are read from its memory."""

    def __init__(self, folder: Path, incomplete: Callable[[], int]):
        """`incomplete` returns how many processes have values that are only in their memory."""
        self._folder = folder
        self._incomplete = incomplete

    def collect(self) -> Iterator[Metric]:
        """Yield each metric once."""
        with _lock:
            own = {f"{kind}_{os.getpid()}{SUFFIX}": pages.values() for kind, pages in _own.items()}
        summed: dict[str, Values] = {kind: {} for kind in KINDS}
        with locked(self._folder, fcntl.LOCK_SH):
            others = {file.name: read(file) for file in self._folder.glob("*" + SUFFIX) if file.name not in own}
        for name, values in {**others, **own}.items():
            if (kind := _kind(name)) in summed:
                _add(summed[kind], values)
        metrics: dict[str, Metric] = {}
        for kind, values in summed.items():
            for key, value in values.items():
                metric_name, name, labels, help_text = json.loads(key)
                metric = metrics.setdefault(metric_name, Metric(metric_name, help_text, kind))
                metric.add_sample(name, tuple(sorted(labels.items())), value)  # pyright: ignore[reportArgumentType]
        collector: Any = multiprocess.MultiProcessCollector
        yield from collector._accumulate_metrics(metrics, accumulate=True)  # adds up the buckets of histograms
        yield GaugeMetricFamily(
            "modepath_metrics_incomplete",
            "workers whose metrics are only in their memory, because their folder is full or not writable",
            value=self._incomplete(),
        )


class Archive:
    """The values of dead workers, merged into one file per kind. Used in the process that starts the workers."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._values: dict[str, Values] = {}

    def merge(self, living: Collection[int]) -> None:
        """Merge the files of processes that are not among the `living` and have ended.

        Raises:
            OSError: there is no space for the merged file; all files stay unchanged.
        """
        dead: dict[str, list[Path]] = {kind: [] for kind, values in self._values.items() if values and self._lost(kind)}
        for file in self._folder.glob("*" + SUFFIX):
            number = file.stem.rpartition("_")[2]
            if number.isdecimal() and int(number) not in living and not _alive(int(number)):
                dead.setdefault(_kind(file.name), []).append(file)
        if not dead:
            return
        with locked(self._folder, fcntl.LOCK_EX) as held:
            if not held:
                return  # merged next time
            for kind, files in dead.items():
                if kind in KINDS:
                    self._take_in(kind, files)
                for file in files:
                    file.unlink(missing_ok=True)

    def _lost(self, kind: str) -> bool:
        return not self._file(kind).exists()

    def _file(self, kind: str) -> Path:
        return self._folder / f"{kind}_{ARCHIVE}{SUFFIX}"

    def _take_in(self, kind: str, files: list[Path]) -> None:
        values = dict(self._values.get(kind, {}))
        for file in files:
            _add(values, read(file))
        entries = b"".join(_entry(key, value) for key, value in values.items())
        begun = self._file(kind).with_suffix(".new")
        try:
            begun.write_bytes(_used.pack(_HEADER + len(entries)) + bytes(4) + entries)
            begun.rename(self._file(kind))
        except OSError:
            begun.unlink(missing_ok=True)
            raise
        self._values[kind] = values


@contextlib.contextmanager
def locked(folder: Path, how: int) -> Generator[bool]:
    """Hold the folder's lock. Yields False if another process does not release it in time, or if it does not exist."""
    try:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # the folder was removed or is read-only, so no process merges files in it
        yield False
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not (held := _try_lock(file, how)) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield held
    finally:
        os.close(file)


def read(file: Path) -> Values:
    """Return the values in a file; empty if the file is missing or has another format."""
    values: Values = {}
    with contextlib.suppress(OSError, struct.error, UnicodeDecodeError):
        data = file.read_bytes()
        end = min(_used.unpack_from(data)[0], len(data))
        position = _HEADER
        while position < end:
            length: int = _used.unpack_from(data, position)[0]
            if length <= 0:
                break
            key = data[position + 4 : position + 4 + length].decode()
            position += 4 + _padded(length)
            values[key] = _number.unpack_from(data, position)[0]
            position += 16
    return values


def _add(total: Values, values: Values) -> None:
    for key, value in values.items():
        total[key] = total.get(key, 0.0) + value


def _entry(key: str, value: float) -> bytes:
    encoded = key.encode()
    padding = b" " * (_padded(len(encoded)) - len(encoded))
    return _used.pack(len(encoded)) + encoded + padding + _number.pack(value) + _number.pack(0.0)


def _padded(length: int) -> int:
    return length + 8 - (length + 4) % 8  # so that values are at multiples of 8


def _kind(name: str) -> str:
    return name.partition("_")[0]


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _allocate(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    elif os.pwrite(file, bytes(size), 0) < size:  # macOS
        raise OSError("no space")


def _own_folder(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700, parents=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is not a folder of this user")  # any user may create folders in /tmp


def _try_lock(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
