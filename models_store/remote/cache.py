"""Copies of published versions on this machine, each checked against its manifest, up to a total size.

<cache>/<name>/<number>/         the version's folder, as in a store on a disk
<cache>/<name>/.locks/<number>   locked, shared, by every process that uses the version
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models_store import files
from models_store.errors import CorruptionError, StoreError
from models_store.remote.objects import Objects

_AT_ONCE = 8  # objects that are fetched in parallel
_PARTIAL = ".partial-"


class Lease:
    """Keeps one version in the cache until nothing refers to it any more."""

    def __init__(self, descriptor: int):
        """`descriptor` is of the version's lock; it is closed with this."""
        weakref.finalize(self, os.close, descriptor)


class Cache:
    """The cache of one bucket."""

    def __init__(self, address: str):
        """Find its folder; nothing is created yet.

        Raises:
            StoreError: there is no folder for caches, or $MODEPATH_CACHE_GIB is not a size.
        """
        place = files.cache_folder()
        if place is None:
            raise StoreError(
                f"The store {address} needs a folder for copies of its versions: set $MODEPATH_CACHE to one."
            )
        self.folder = place / "objects" / hashlib.sha256(address.encode()).hexdigest()[:16]
        self._most_bytes = _most_bytes()
        # Of the versions that this process uses.
        self._leases: weakref.WeakValueDictionary[tuple[str, int], Lease] = weakref.WeakValueDictionary()
        self._guard = threading.Lock()

    def version(self, name: str, number: int) -> Path:
        """The folder of a version, which need not exist."""
        return self.folder / name / str(number)

    def hold(self, name: str, number: int) -> Lease:
        """Keep a version from being evicted for as long as the result is referred to.

        Raises:
            OSError: the lock cannot be made.
        """
        with self._guard:
            if (lease := self._leases.get((name, number))) is None:
                lock = self._lock_file(name, number)
                lock.parent.mkdir(parents=True, exist_ok=True)
                while True:
                    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    if _is_still(descriptor, lock):
                        break
                    os.close(descriptor)
                lease = self._leases[name, number] = Lease(descriptor)
            os.utime(self._lock_file(name, number))  # the time of its last use
        return lease

    def fill(
        self, name: str, number: int, manifest: bytes, hashes: Mapping[str, str], objects: Objects, key: Callable[[str], str]
    ) -> Lease:  # fmt: skip
        """Make a version complete: each file that is missing or damaged is fetched and checked.

        Args:
            name: the ensemble.
            number: the version.
            manifest: content of its manifest.
            hashes: sha256 of each file, by path.
            objects: the bucket.
            key: the key of each file, by path.

        Returns:
            What keeps the version from being evicted; see hold.

        Raises:
            CorruptionError: an object is missing, or is not what was published.
            StoreReadError: the bucket cannot be read.
            OSError: the cache cannot be written.
        """
        lease = self.hold(name, number)
        folder = self.version(name, number)
        if not folder.exists():
            self._evict()  # makes room, as far as the limit does
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(self._lock_file(name, number).with_suffix(".fetching")):
            self._remove_foreign(folder, hashes)
            missing = [path for path, digest in hashes.items() if not _is_whole(folder / path, digest)]

            def fetch(path: str) -> None:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.parent / f"{_PARTIAL}{target.name}"
                if not objects.download(key(path), partial):
                    raise CorruptionError(f"{name}@{number} lacks {path} in {objects.address}. Publish again.")
                if not _is_whole(partial, hashes[path]):
                    partial.unlink()
                    raise CorruptionError(
                        f"{name}@{number}: {path} in {objects.address} is not the file that was published (its sha256 differs). "
                        "Publish again."
                    )
                partial.replace(target)

            if missing:
                with ThreadPoolExecutor(_AT_ONCE, "fetching") as threads:
                    list(threads.map(fetch, missing))
            target = folder / "manifest.json"
            if not target.is_file() or target.read_bytes() != manifest:
                partial = folder / f"{_PARTIAL}manifest.json"
                partial.write_bytes(manifest)
                partial.replace(target)
        if missing:
            self._evict()
        return lease

    def _remove_foreign(self, folder: Path, hashes: Mapping[str, str]) -> None:
        for path, is_folder in files.tree(folder).items():
            if not is_folder and path not in hashes and path != "manifest.json":
                (folder / path).unlink()

    def _evict(self) -> None:
        """Remove versions that no process uses, the one used least recently first, until the rest is small enough."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.locked(self.folder / ".evicting"):  # so that locks do not disappear meanwhile
            locks = [lock for lock in self.folder.glob("*/.locks/*") if lock.name.isdecimal()]
            locks.sort(key=lambda lock: lock.stat().st_mtime)
            folders = {lock: self.version(lock.parents[1].name, int(lock.name)) for lock in locks}
            sizes = {lock: _size(folder) for lock, folder in folders.items()}
            total = sum(sizes.values())
            for lock, folder in folders.items():
                if total <= self._most_bytes:
                    return
                descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                else:
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.unlink()
                    total -= sizes[lock]
                finally:
                    os.close(descriptor)

    def _lock_file(self, name: str, number: int) -> Path:
        return self.folder / name / ".locks" / str(number)


def _most_bytes() -> int:
    given = os.environ.get("MODEPATH_CACHE_GIB", "20")
    try:
        size = float(given)
    except ValueError:
        size = -1.0
    if not 0 <= size < 2**40:
        raise StoreError(f"$MODEPATH_CACHE_GIB must be a number of GiB, for example 20; got {given!r}.")
    return int(size * 2**30)


def _is_still(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _is_whole(file: Path, digest: str) -> bool:
    try:
        return files.sha256(file, 2**62) == digest
    except (OSError, CorruptionError):  # missing, or not a regular file
        return False


def _size(folder: Path) -> int:
    found = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found += file.lstat().st_size
    return found
