"""The store of a bucket: what store.Store does for a folder.

files/<name>/<number>/…            a version's files, as on a disk
manifests/<name>/<number>.json     its manifest, written last
signatures/<name>/<number>.sig     its signature
records.py has the rest. Versions are read by way of the cache, so that members, banks and checks find files.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models_store import files
from models_store.errors import CorruptionError, EnsembleNotFoundError, StoreError, StoreReadError, StoreWriteError
from models_store.manifest import MAX_BYTES, Manifest
from models_store.remote import records
from models_store.remote.cache import Cache, Lease
from models_store.remote.objects import SCHEMES, Entry, Objects
from models_store.remote.records import Listing, RemoteActivations, RemoteRollOuts
from models_store.store import MANIFEST, NAME_PATTERN, Store, Version, concerns, default_root, not_activated

_AT_ONCE = 8  # files that are uploaded in parallel
_STAGING = ".staging-"
REMAINS_AFTER = datetime.timedelta(days=1)
_KEY = re.compile(r"([^/]+)/([1-9][0-9]{0,17})\.json")


class RemoteVersion(Version):
    """A published version, whose files are fetched when its folder is asked for."""

    _fetch: Callable[[Manifest], tuple[Path, Lease]]
    _place: tuple[Path, Lease] | None

    def __init__(self, manifest: Manifest, digest: str, fetch: Callable[[Manifest], tuple[Path, Lease]]):
        for name, value in (("manifest", manifest), ("digest", digest), ("_fetch", fetch), ("_place", None)):
            object.__setattr__(self, name, value)  # it is frozen

    @property
    def folder(self) -> Path:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The folder in the cache, complete and checked at the first use of this object. It stays while this object does.

        Raises:
            CorruptionError: an object is missing, or is not what was published.
            StoreReadError: the bucket cannot be read.
            StoreWriteError: the cache cannot be written.
        """
        if self._place is None:
            object.__setattr__(self, "_place", self._fetch(self.manifest))
        assert self._place is not None, "it was just fetched"
        return self._place[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteVersion) and (self.manifest, self.digest) == (other.manifest, other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)


class RemoteStore(Store):
    """The published ensembles in a bucket."""

    def __init__(self, root: Path | None = None):
        """Open it; nothing is asked of the bucket yet.

        Raises:
            StoreError: the address is not one of object storage, or a package or the cache is missing.
        """
        address = re.sub(
            r"^([A-Za-z0-9+.-]+):/+", r"\1://", str(root or default_root())
        )  # Path collapses the two slashes
        self.root = Path(address)
        self.address = address.rstrip("/")
        if address.partition("://")[0] not in SCHEMES:
            raise StoreError(
                f"The store {address!r} is not an address of object storage. Set $MODELS_STORE to a folder, or to s3://BUCKET/PREFIX, gs://BUCKET/PREFIX "
                "or az://CONTAINER/PREFIX."
            )
        self._objects = Objects(self.address)
        self._cache = Cache(self.address)
        self._manifests = Listing(self._objects, "manifests")
        self._named: tuple[object, Mapping[str, list[int]]] = None, {}
        self._remote_activations = RemoteActivations(self._objects, self._manifests)
        self._activations = self._remote_activations
        self._roll_outs = RemoteRollOuts(self._objects, self._remote_activations)

    # Reading

    def names(self) -> list[str]:
        """See Store."""
        return sorted(self._by_name())

    def versions(self, name: str) -> list[int]:
        """See Store."""
        self._folder(name)
        return sorted(self._by_name().get(name, ()))

    def _by_name(self) -> Mapping[str, list[int]]:
        """The numbers of each name. They are read once from each listing, which stays the same object while it is fresh."""
        tags = self._manifests.tags()
        if self._named[0] is not tags:
            found: dict[str, list[int]] = {}
            for key in filter(None, map(_KEY.fullmatch, tags)):
                if NAME_PATTERN.fullmatch(key[1]):
                    found.setdefault(key[1], []).append(int(key[2]))
            self._named = tags, found
        return self._named[1]

    def load(self, name: str, version: int | None = None) -> Version:
        """See Store."""
        version = self.active(name) if version is None else version
        content = self._manifest(name, version)
        manifest = Manifest.parse(content, where=f"{self.address}/manifests/{name}/{version}.json")
        if (manifest.name, manifest.version) != (name, version):
            raise CorruptionError(
                f"{self.address}/manifests/{name}/{version}.json is the manifest of {manifest.name}@{manifest.version}: it was moved or copied."
            )
        return RemoteVersion(manifest, hashlib.sha256(content).hexdigest(), self._fetch)

    def _manifest(self, name: str, version: int) -> bytes:
        self._folder(name)
        content = self._manifests.content(f"{name}/{version}.json")
        if content is None:  # the listing may be older than the version
            found = self._objects.get(f"manifests/{name}/{version}.json")
            content = found and found[0]
        if content is None:
            known = ", ".join(map(str, self.versions(name))) or "none"
            raise EnsembleNotFoundError(
                f"{name!r} has no version {version} in {self.address} (published: {known}). {self._published()}"
            )
        if len(content) > MAX_BYTES:
            raise CorruptionError(f"{self.address}/manifests/{name}/{version}.json is too large to be a manifest.")
        return content

    def _fetch(self, manifest: Manifest) -> tuple[Path, Lease]:
        name, number = manifest.name, manifest.version
        content = self._manifest(name, number)
        with self._caching():
            lease = self._cache.fill(
                name, number, content, manifest.files, self._objects, lambda path: f"files/{name}/{number}/{path}"
            )
            self._fetch_signature(name, number)
        return self._cache.version(name, number), lease

    @contextlib.contextmanager
    def _caching(self) -> Generator[None]:
        """Turn an OSError into a StoreWriteError that names the cache."""
        try:
            yield
        except OSError as error:
            raise StoreWriteError(
                f"Cannot write copies of {self.address} to {self._cache.folder}: {error.strerror or error}. Free space, lower $MODEPATH_CACHE_GIB, or "
                "set $MODEPATH_CACHE to another folder."
            ) from None

    def signature(self, name: str, version: int) -> Path:
        """The copy of a signature in the cache; see Store."""
        self._folder(name)
        with self._caching():
            return self._fetch_signature(name, version)

    def _fetch_signature(self, name: str, version: int) -> Path:
        file = self._cache.folder / name / ".signatures" / f"{version}.sig"
        if (found := self._objects.get(f"signatures/{name}/{version}.sig")) is None:
            file.unlink(missing_ok=True)
        elif not file.is_file() or file.read_bytes() != found[0]:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{secrets.token_hex(4)}")
            partial.write_bytes(found[0])
            partial.replace(file)
        return file

    def keep_signature(self, name: str, version: int) -> None:
        """See Store."""
        self._objects.put(
            f"signatures/{name}/{version}.sig", self._cache.folder / name / ".signatures" / f"{version}.sig"
        )

    # Writing

    def check_writable(self, name: str) -> None:
        """See Store."""
        self._folder(name)
        probe = f"probes/{secrets.token_hex(8)}"
        self._objects.put(probe, b"x")
        self._objects.delete(probe)

    @contextlib.contextmanager
    def staging(self, name: str) -> Generator[Path]:
        """A folder for a version's files, on this machine; see Store. Publishers do not wait for one another."""
        self._folder(name)
        self._finish_pending(name)
        with self._caching():
            folder, lock = self._staged()
        try:
            yield folder
        except OSError as error:
            if not concerns(error, folder):
                raise
            with self._caching():
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def _staged(self) -> tuple[Path, int]:
        """A new folder, locked for as long as this process lives; those of publishers that were killed are removed."""
        self._cache.folder.mkdir(parents=True, exist_ok=True)
        with files.locked(self._cache.folder / ".staging"):
            for left in self._cache.folder.glob(f"{_STAGING}*"):
                if (lock := _free(left)) is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)
            folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self._cache.folder))
            lock = _free(folder)
            assert lock is not None, "it was just made"
        return folder, lock

    def _next_number(self, name: str) -> int:
        return records.claim_number(self._objects, name, above=max(self.versions(name), default=0))

    def _claim(self, name: str, version: int, digest: str) -> None:
        if not records.claim_this_number(self._objects, name, version, digest):
            raise StoreError(
                f"{name}@{version} in {self.address} was begun by another publisher, so it cannot be copied there under this number. Nothing was published."
            )

    def _is_published(self, name: str, version: int) -> bool:
        return self._objects.get(f"manifests/{name}/{version}.json") is not None

    def _put(self, staged: Path, manifest: Manifest, digest: str, *, activate: bool) -> Version:
        name, number = manifest.name, manifest.version

        def upload(path: str) -> None:
            self._objects.put(f"files/{name}/{number}/{path}", staged / path)

        with _said("Nothing was published."):
            if activate:
                self._activations.announce(name, number)
            with ThreadPoolExecutor(_AT_ONCE, "uploading") as threads:
                list(threads.map(upload, manifest.files))
        content = (staged / MANIFEST).read_bytes()
        if not self._objects.put_new(f"manifests/{name}/{number}.json", content):
            raise StoreError(f"{name}@{number} was published by somebody else meanwhile. Nothing was published.")
        self._manifests.forget()
        if activate:
            with _said(not_activated(name, number)):
                self._serve_newer(name, number)
        return RemoteVersion(manifest, digest, self._fetch)

    def _serve_newer(self, name: str, version: int) -> bool:
        """Serve a version unless a newer one is active. Returns whether it is active now."""
        served = self._remote_activations.serve(name, version, only_newer=True)
        if served:
            self._roll_outs.remove(name)
        self._activations.retract(name)
        return served

    def _activate(self, name: str, version: int, *, only_pending: bool = False) -> bool:
        with _said(f"{name}@{version} may not be active; run again: python -m models_store activate {name} {version}"):
            return self._serve_newer(name, version) if only_pending else super()._activate(name, version)

    def remove(self, name: str, version: int) -> bool:
        """See Store. Do not activate the same version at the same moment: there is no lock."""
        self._folder(name)
        if version in (self._activations.active(name), self._activations.pending(name), self.canary(name)):
            return False
        self._objects.delete(f"manifests/{name}/{version}.json")  # first: readers see the whole version or none
        self._manifests.forget()
        self._objects.delete(*(entry.key for entry in self._objects.list(f"files/{name}/{version}")))
        self._objects.delete(f"signatures/{name}/{version}.sig")
        return True

    def remove_remains(self, *, dry: bool = False) -> list[str]:
        """See Store. Files of a version without a manifest count as remains a day after the last of them was written."""
        self._manifests.forget()
        found: dict[str, list[Entry]] = {}
        for entry in (one for prefix in ("files", "signatures") for one in self._objects.list(prefix)):
            name, _, rest = entry.key.partition("/")[2].partition("/")
            version = rest.partition("/")[0].removesuffix(".sig")
            if f"{name}/{version}.json" not in self._manifests.tags():
                found.setdefault(f"{name}@{version}", []).append(entry)
        day_ago = datetime.datetime.now(datetime.UTC) - REMAINS_AFTER
        old = {shown: entries for shown, entries in found.items() if max(one.written for one in entries) < day_ago}
        if not dry:
            self._objects.delete(*(entry.key for entries in old.values() for entry in entries))
        return sorted(old)

    def _records(self) -> Path:
        return self._cache.folder

    def _publishers_lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def _said(outcome: str) -> Generator[None]:
    """Add to the message of an error of the bucket what is published."""
    try:
        yield
    except (StoreReadError, StoreWriteError) as error:
        raise StoreWriteError(f"{error} {outcome}") from None


def _free(folder: Path) -> int | None:
    """A descriptor that locks a folder; None if another process has locked or removed it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
