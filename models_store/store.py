"""The folder of published ensembles. FORMAT.md is its contract.

<root>/<name>/<version>/   immutable once published
<root>/<name>/active       the version that is served
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from models_store.bank import check_bank
from models_store.errors import (
    CorruptionError,
    EnsembleNotFoundError,
    InvalidNameError,
    StoreError,
    StoreWriteError,
)
from models_store.manifest import SCHEMA_VERSION, Draft, Manifest
from models_store.onnx_contract import check_member

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MANIFEST = "manifest.json"
ACTIVE = "active"
ACTIVE_BYTES, MANIFEST_BYTES = 32, 2**24  # at most; beyond, it is damaged
_STAGING_PREFIX = ".staging-"


@dataclass(frozen=True)
class Version:
    """A published version: its folder and its manifest."""

    folder: Path
    manifest: Manifest
    digest: str = ""  # sha256 of the manifest's bytes, which list the hashes of all other files

    @property
    def name(self) -> str:
        """`NAME@VERSION`."""
        return f"{self.manifest.name}@{self.manifest.version}"


def default_root() -> Path:
    """$MODELS_STORE, or `ensembles/` inside this package."""
    return Path(os.environ.get("MODELS_STORE") or Path(__file__).parent / "ensembles")


class Store:
    """Published ensembles below one folder. The folder need not exist yet."""

    def __init__(self, root: Path | None = None):
        self.root = root or default_root()

    # Reading

    def names(self) -> list[str]:
        """Ensembles with at least one published version, sorted; none where the store's folder does not exist.

        Raises:
            StoreError: the folder cannot be listed.
        """
        try:
            entries = sorted(entry.name for entry in self.root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(
                f"The store {self.root} cannot be listed: {error.strerror}. Check its folder and its owner."
            ) from None
        return [name for name in entries if NAME_PATTERN.fullmatch(name) and self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """Published versions of `name`, ascending; empty when there is none."""
        folder = self._folder(name)
        if not folder.is_dir():
            return []
        return sorted(int(d.name) for d in folder.iterdir() if d.name.isdecimal() and (d / MANIFEST).is_file())

    def active(self, name: str) -> int:
        """The version that is served.

        Raises:
            EnsembleNotFoundError: nothing is active under that name.
        """
        file = self._folder(name) / ACTIVE
        try:
            text = _read(file, ACTIVE_BYTES).decode("utf-8", "replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            raise EnsembleNotFoundError(
                f"No version of {name!r} is active in {self.root}. {self._published()} "
                f"Publish one, or run: python -m models_store activate {name} VERSION"
            ) from None
        if not text.isdecimal():
            raise CorruptionError(
                f"{file} holds {text!r}, not a version; run: python -m models_store activate {name} VERSION"
            )
        return int(text)

    def activation_token(self, name: str) -> str:
        """Changes when a version of `name` is activated, also the same one anew."""
        found = (self._folder(name) / ACTIVE).stat()
        return f"{found.st_ino} {found.st_mtime_ns}"

    def activation_order(self) -> list[str]:
        """Names with an active version; what was activated last comes last."""
        times: dict[str, float] = {}
        for name in self.names():
            with contextlib.suppress(FileNotFoundError):
                times[name] = (self._folder(name) / ACTIVE).stat().st_mtime
        return sorted(times, key=lambda name: times[name])

    def digest(self, name: str, version: int) -> str:
        """sha256 of a version's manifest as it lies there, which is not parsed.

        Raises:
            EnsembleNotFoundError: no such version.
            CorruptionError: it is not a file, or far too large.
        """
        return hashlib.sha256(self._manifest(name, version)).hexdigest()

    def load(self, name: str, version: int | None = None) -> Version:
        """Read the manifest of a version; without one, of the active version.

        Raises:
            EnsembleNotFoundError: no such ensemble or version.
            ManifestError: the manifest breaks FORMAT.md.
            CorruptionError: the folder holds another name or version than its manifest says.
        """
        version = self.active(name) if version is None else version
        folder = self._folder(name) / str(version)
        text = self._manifest(name, version)
        manifest = Manifest.parse(text, where=str(folder / MANIFEST))
        if (manifest.name, manifest.version) != (name, version):
            raise CorruptionError(
                f"{folder} holds the manifest of {manifest.name}@{manifest.version}: it was moved or copied."
            )
        return Version(folder, manifest, hashlib.sha256(text).hexdigest())

    def _manifest(self, name: str, version: int) -> bytes:
        try:
            return _read(self._folder(name) / str(version) / MANIFEST, MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            known = ", ".join(map(str, self.versions(name))) or "none"
            raise EnsembleNotFoundError(
                f"{name!r} has no version {version} in {self.root} (published: {known}). {self._published()}"
            ) from None

    def resolve(self, reference: str) -> Version:
        """Read `NAME` or `NAME@VERSION`."""
        name, _, version = reference.partition("@")
        if version and not version.isdecimal():
            raise InvalidNameError(f"{reference!r} is not NAME or NAME@VERSION, for example digits-fge@2.")
        return self.load(name, int(version) if version else None)

    def find_run(self, name: str, run: str) -> int | None:
        """The version of `name` that training run `run` published, if it still lies here."""
        for version in self.versions(name):
            with contextlib.suppress(StoreError):
                if self.load(name, version).manifest.provenance.run == run:
                    return version
        return None

    # Writing

    def check_writable(self) -> None:
        """Fail now rather than after hours of training.

        Raises:
            StoreWriteError: the root cannot be made or written.
        """
        with _write_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"x")

    @contextlib.contextmanager
    def staging(self, name: str) -> Generator[Path]:
        """A folder to write a version's files to, before `publish` makes it one. Removed if anything fails.

        Publishers of one name take turns, so what an earlier one left behind when it was killed is rubbish and is cleared.

        Raises:
            StoreWriteError: the disk is full, or the store cannot be written.
        """
        home = self._folder(name)
        with _write_errors(self.root), contextlib.ExitStack() as stack:
            home.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((home / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_behind in home.glob(_STAGING_PREFIX + "*"):
                shutil.rmtree(left_behind)
            folder = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=home))
            folder.chmod(0o755)  # mkdtemp makes it private; a service may run as another user
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            yield folder

    def publish(self, name: str, staged: Path, draft: Draft, *, activate: bool = True) -> Version:
        """Turn a staged folder into the next version. Call it inside `staging`.

        Every file is hashed and checked, then the manifest is written, then the folder is renamed: a reader sees a whole
        version or none.

        Raises:
            MemberError: a member breaks FORMAT.md.
            StoreWriteError: the disk is full, or the store cannot be written.
        """
        for member in draft.members:
            check_member(staged / member.file, draft.input.shape, len(draft.classes))
        if draft.bank is not None:
            check_bank(staged / "bank", draft.input.shape, len(draft.classes), draft.bank.points)
        home = self._folder(name)
        taken = [int(d.name) for d in home.iterdir() if d.name.isdecimal()]
        version = max(taken, default=0) + 1
        manifest = Manifest(
            **draft.model_dump(),
            schema_version=SCHEMA_VERSION,
            name=name,
            version=version,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files={path.relative_to(staged).as_posix(): sha256(path) for path in _files(staged)},
        )
        with _write_errors(self.root):
            _write_durably(staged / MANIFEST, manifest.dump())
            for path in [*_files(staged), *(p for p in staged.rglob("*") if p.is_dir()), staged]:
                _fsync(path)
            target = home / str(version)
            staged.rename(target)
            _fsync(home)
        if activate:
            self.activate(name, version)
        return Version(target, manifest)

    def activate(self, name: str, version: int) -> None:
        """Serve this version from now on.

        Raises:
            EnsembleNotFoundError: no such version.
            StoreWriteError: the store cannot be written.
        """
        self.load(name, version)
        home = self._folder(name)
        with _write_errors(self.root):
            _write_durably(home / f"{ACTIVE}.new", f"{version}\n")
            (home / f"{ACTIVE}.new").replace(home / ACTIVE)
            _fsync(home)

    # Checking

    def verify(self, version: Version) -> None:
        """Hold a version's files against its manifest.

        Raises:
            CorruptionError: a file is missing, foreign, or differs from its hash.
            MemberError: a member breaks the ONNX contract.
        """
        manifest, folder = version.manifest, version.folder
        present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
        if missing := sorted(set(manifest.files) - present):
            raise CorruptionError(
                f"{version.name} lacks {', '.join(missing)}: restore the folder from a copy, or publish again."
            )
        if foreign := sorted(present - set(manifest.files)):
            raise CorruptionError(
                f"{version.name} has files its manifest does not list: {', '.join(foreign)}. Remove them."
            )
        for path, digest in manifest.files.items():
            if (folder / path).is_symlink() or sha256(folder / path) != digest:
                raise CorruptionError(
                    f"{version.name}: {path} is not the file that was published (its sha256 differs). "
                    "Restore it from a copy, or publish again."
                )
        for member in manifest.members:
            check_member(folder / member.file, manifest.input.shape, len(manifest.classes))
        if manifest.bank is not None:
            check_bank(folder / "bank", manifest.input.shape, len(manifest.classes), manifest.bank.points)

    def _folder(self, name: str) -> Path:
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidNameError(
                f"{name!r} cannot name an ensemble: use 1 to 64 letters, digits, '.', '_' or '-', not starting with a dot or dash."
            )
        return self.root / name

    def _published(self) -> str:
        names = self.names()
        return f"Published here: {', '.join(names)}." if names else "Nothing is published here."


def _read(path: Path, most: int) -> bytes:
    """A small file; a FIFO or a device would block its reader."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise CorruptionError(f"{path} is not a file of at most {most} bytes. Restore it, or publish again.")
        return file.read(most)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _write_errors(root: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why, do = "the disk is full", "Free space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            why, do = f"it is not writable ({error.strerror})", "Check the folder's owner and permissions"
        else:
            raise
        raise StoreWriteError(
            f"Cannot write to the store {root}: {why}. {do}, or point $MODELS_STORE elsewhere. Nothing was published."
        ) from None
