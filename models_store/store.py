"""The folder of published ensembles. FORMAT.md specifies it.

<root>/<name>/<version>/   immutable once published
<root>/<name>/active       the version that is served
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import os
import re
import shutil
import stat
import sysconfig
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from models_store import examples, files
from models_store.bank import check_bank
from models_store.decisions.calibration import load_answers
from models_store.errors import (
    CorruptionError,
    EnsembleNotFoundError,
    InvalidNameError,
    StoreError,
    StoreReadError,
    StoreWriteError,
)
from models_store.graphs.novelty import Detector
from models_store.graphs.onnx_contract import MAX_MODEL_BYTES, check_member
from models_store.manifest import MAX_BYTES, Draft, Manifest
from models_store.records import numbering
from models_store.records.activation import Activations
from models_store.records.rollout import RollOut, RollOuts

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MANIFEST = "manifest.json"
MAX_WEIGHTS_BYTES = 2**36  # size limit of a safetensors file
_SIGNATURE_BYTES = 2**24
_STAGING_PREFIX = ".staging-"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: Path collapses the two of s3://bucket


@dataclass(frozen=True)
class Version:
    """A published version: its folder and its manifest."""

    folder: Path
    manifest: Manifest
    digest: str  # sha256 (hex) of manifest.json; versions are identical if and only if their digests are equal

    @property
    def name(self) -> str:
        """`NAME@VERSION`."""
        return f"{self.manifest.name}@{self.manifest.version}"


def default_root(package: Path = Path(__file__).parent) -> Path:
    """$MODELS_STORE; else `ensembles/` inside this package, in a checkout or a bento; else the user's data folder.

    An installed package lies among other packages, which an upgrade replaces: ensembles would be lost there.
    """
    if configured := os.environ.get("MODELS_STORE"):
        return Path(configured)
    inside = package / "ensembles"
    installed = package.parent in (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))
    return inside if inside.exists() or not installed else platformdirs.user_data_path("modepath") / "ensembles"


class Store:
    """The published ensembles in one folder, which need not exist yet, or in a bucket, if the root is its address.

    Raises:
        StoreError: the root is an address, but not one of object storage, or what that needs is missing.
    """

    def __new__(cls, root: Path | None = None) -> Store:
        """Open a RemoteStore if the root is an address."""
        if cls is not Store or not _ADDRESS.match(str(root or default_root())):
            return super().__new__(cls)
        from models_store.remote.store import RemoteStore  # it is a Store, and few need it

        return super().__new__(RemoteStore)  # pyright: ignore[reportArgumentType]

    def __init__(self, root: Path | None = None):
        self.root = root or default_root()
        self.address = str(self.root)
        self._activations = Activations(self.root)
        self._roll_outs = RollOuts(self.root)

    # Reading

    def names(self) -> list[str]:
        """Sorted names of the ensembles with at least one published version; empty if the root does not exist yet.

        An ensemble whose folder cannot be read is included: reading it raises an error with the reason.

        Raises:
            StoreReadError: the root cannot be listed, although it may hold ensembles.
        """
        try:
            with files.reading(self.root):
                entries = [entry.name for entry in self.root.iterdir()]
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise StoreReadError(f"The store {self.address} is not a folder. Set $MODELS_STORE to one.") from None
        return sorted(name for name in entries if NAME_PATTERN.fullmatch(name) and self._may_hold_versions(name))

    def versions(self, name: str) -> list[int]:
        """Published versions of `name` in ascending order; empty if there are none.

        Raises:
            StoreReadError: its folder cannot be listed.
        """
        folder = self._folder(name)
        try:
            with files.reading(folder):
                entries = [entry.name for entry in folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        numbers = (entry for entry in entries if numbering.NUMBER.fullmatch(entry))
        return sorted(int(number) for number in numbers if _is_there(folder / number / MANIFEST))

    def active(self, name: str) -> int:
        """The version of `name` that is served.

        Raises:
            EnsembleNotFoundError: no version of `name` is active.
            CorruptionError: the file `active` does not hold a number.
            StoreReadError: the file cannot be read.
        """
        self._folder(name)
        if (version := self._activations.active(name)) is None:
            raise EnsembleNotFoundError(
                f"No version of {name!r} is active in {self.address}. {self._published()} "
                f"Publish one, or run: python -m models_store activate {name} VERSION"
            )
        return version

    def activation_order(self) -> list[str]:
        """Names that have an active version, in order of their last activation, the latest last.

        Raises:
            StoreReadError: the root cannot be listed.
        """
        return self._activations.order(self.names())

    def activation_token(self, name: str) -> object:
        """A value that changes with each activation of `name`, even of the same version; None if nothing is active.

        Raises:
            StoreReadError: the file `active` cannot be read.
        """
        self._folder(name)
        return self._activations.token(name)

    def roll_out(self, name: str) -> RollOut | None:
        """The latest roll-out of `name`, also if it was rolled back; None if there is none.

        Raises:
            CorruptionError: the file is not a roll-out.
            StoreReadError: the file cannot be read.
        """
        self._folder(name)
        return self._roll_outs.read(name)

    def load(self, name: str, version: int | None = None) -> Version:
        """Read the manifest of a version (default: the active version).

        Raises:
            EnsembleNotFoundError: no such ensemble or version.
            ManifestError: the manifest breaks FORMAT.md, or is not the one that was published.
            CorruptionError: the manifest's name or version differs from the folder's, or the version's folder or its
                manifest is a symbolic link.
            StoreReadError: the folder or the manifest cannot be read.
        """
        version = self.active(name) if version is None else version
        folder, content = self._folder(name) / str(version), self._manifest(name, version)
        manifest = Manifest.parse(content, where=str(folder / MANIFEST))
        if (manifest.name, manifest.version) != (name, version):
            raise CorruptionError(
                f"{folder} holds the manifest of {manifest.name}@{manifest.version}: it was moved or copied."
            )
        return Version(folder, manifest, hashlib.sha256(content).hexdigest())

    def digest(self, name: str, version: int) -> str:
        """sha256 (hex) of a version's stored manifest, equal to `Version.digest`. The manifest is not parsed.

        Raises:
            EnsembleNotFoundError: no such version.
            CorruptionError: its folder is a symbolic link, or its manifest is not a regular file or is too large.
            StoreReadError: the folder or the manifest cannot be read.
        """
        return hashlib.sha256(self._manifest(name, version)).hexdigest()

    def _manifest(self, name: str, version: int) -> bytes:
        folder = self._folder(name) / str(version)
        try:
            with files.reading(folder):
                if folder.is_symlink():
                    raise CorruptionError(f"{folder} is a symbolic link; a version is a folder. Copy it here instead.")
                return files.read(folder / MANIFEST, MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            known = ", ".join(map(str, self.versions(name))) or "none"
            raise EnsembleNotFoundError(
                f"{name!r} has no version {version} in {self.address} (published: {known}). {self._published()}"
            ) from None

    def resolve(self, reference: str) -> Version:
        """Read the version that `NAME` (the active version) or `NAME@VERSION` refers to; raises as `load` does."""
        name, at, version = reference.partition("@")
        if at and not numbering.NUMBER.fullmatch(version):
            raise InvalidNameError(f"{reference[:120]!r} is not NAME or NAME@VERSION, for example digits-fge@2.")
        return self.load(name, int(version) if version else None)

    def signature(self, name: str, version: int) -> Path:
        """The file that holds the signature of a version, if it is signed; see signing.py."""
        return self._folder(name) / ".signatures" / f"{version}.sig"

    def find_run(self, name: str, run: str, quantized: str | None = None) -> int | None:
        """The version of `name` that training run `run` published; None if it is not in the store.

        Args:
            name: the ensemble.
            run: identity of the run.
            quantized: format of the members; None: float32. A run may be published once in each.
        """
        for version in self.versions(name):
            with contextlib.suppress(StoreError):
                found = self.load(name, version).manifest
                if (found.provenance.run, found.quantization and found.quantization.format) == (run, quantized):
                    return version
        return None

    # Writing

    def check_writable(self, name: str) -> None:
        """Check that `name` can be published, so that training fails at its start rather than after hours.

        Raises:
            StoreWriteError: the root cannot be created or written, or the ensemble's folder cannot be written.
        """
        home = self._folder(name)
        with files.writing(self.root):
            files.make_folder(self.root)
            for folder in (self.root, home) if home.exists() else (self.root,):
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(b"x")
            with self._publishers_lock(name), self._activations.lock():
                pass

    def _publishers_lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        return files.locked(self._records() / f".{name}.lock")

    def _records(self) -> Path:
        """The folder of locks and numbers, created with the root's permissions so that every publisher can use it."""
        records = self.root / numbering.RECORDS
        if not records.is_dir():
            files.make_folder(records)
            records.chmod(stat.S_IMODE(self.root.stat().st_mode))
        return records

    @contextlib.contextmanager
    def staging(self, name: str) -> Generator[Path]:
        """A folder for a version's files, to be filled before `publish` is called. It is removed if anything fails.

        Publishers of one name take turns. The remains of an earlier publisher that was killed are removed. If it had
        published its version but not yet activated it, the version is activated.

        Raises:
            StoreWriteError: the disk is full, or the store cannot be written.
        """
        home = self._folder(name)
        with contextlib.ExitStack() as stack:
            with files.writing(self.root):
                files.make_folder(home)
                stack.enter_context(self._publishers_lock(name))
                for left_behind in home.glob(_STAGING_PREFIX + "*"):
                    shutil.rmtree(left_behind)
                self._finish_pending(name)
                folder = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=home))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                folder.chmod(0o755)  # mkdtemp makes it private, but a service may run as another user
            try:
                yield folder
            except OSError as error:
                if not concerns(error, folder):
                    raise
                with files.writing(self.root):
                    raise

    def publish(
        self, name: str, staged: Path, draft: Draft, *, activate: bool = True, self_test: bool = True
    ) -> Version:
        """Turn a staged folder into the next version. Call it inside `staging`.

        Every file is checked and hashed, then the manifest is written, then the folder is renamed. So a reader sees
        either the whole version or none. Without `self_test` the members are not run, and the version has no examples.

        Raises:
            MemberError: a member breaks FORMAT.md.
            StoreWriteError: the disk is full, or the store cannot be written. The message states what was published.
        """
        for member in draft.members:
            check_member(staged / member.file, draft.input, len(draft.classes))
        if draft.bank is not None:
            check_bank(staged / "bank", draft.input, len(draft.classes), draft.bank.points)
        if draft.calibration is not None:
            load_answers(staged, draft.calibration.ways, draft.calibration.images, len(draft.classes))
            Detector.load(staged, draft)
        with files.writing(self.root):
            if self_test:
                examples.write(staged, draft)
            version = self._next_number(name)
            hashes = {path: files.sha256(staged / path, _most_bytes(path)) for path in _files(staged)}
            manifest = Manifest(
                **draft.model_dump(),
                schema_version=Manifest.schema_of(draft),
                name=name,
                version=version,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                files=dict(sorted(hashes.items())),
            ).sealed()
            content = manifest.dump().encode("utf-8", "surrogatepass")
            Manifest.parse(
                content, where=f"The manifest of {name}@{version}"
            )  # never publish a manifest that cannot be read back
            files.write(staged / MANIFEST, content)
        return self._put(staged, manifest, hashlib.sha256(content).hexdigest(), activate=activate)

    def adopt(self, version: Version, *, activate: bool = True) -> Version:
        """Publish, and by default activate, a copy of another store's version, with the same name and number.

        Raises:
            StoreError: this store already has that version.
            CorruptionError: the copy differs from what was published.
            StoreWriteError: the disk is full, or the store cannot be written. The message states what was published.
        """
        with self.staging(version.manifest.name) as staged:
            name, number = version.manifest.name, version.manifest.version
            if self._is_published(name, number):
                raise StoreError(
                    f"{name}@{number} exists already in {self.address}; give another folder, or remove it."
                )
            self._claim(name, number, version.digest)
            for path in (MANIFEST, *version.manifest.files):
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                with (
                    files.opened(version.folder / path, _most_bytes(path)) as source,
                    (staged / path).open("xb") as copy,
                ):
                    shutil.copyfileobj(source, copy, 2**20)
            self.verify(Version(staged, version.manifest, version.digest))
            self.copy_signature(version)
            return self._put(staged, version.manifest, version.digest, activate=activate)

    def activate(self, name: str, version: int) -> None:
        """Serve this version from now on.

        Raises:
            EnsembleNotFoundError: no such version.
            StoreWriteError: the store cannot be written. The message states whether the version is active.
        """
        self.load(name, version)
        self._activate(name, version)

    def deactivate(self, name: str) -> None:
        """Serve no version of `name` from now on. Its versions stay published.

        Raises:
            EnsembleNotFoundError: no version of `name` is active.
            StoreWriteError: the store cannot be written.
        """
        self.active(name)
        with files.writing(self.root):
            self._records()
            with self._activations.lock():
                names = self.names()
                self._roll_outs.remove(name)
                self._activations.remove(name)
                self._activations.settle(name, names)

    def begin_roll_out(self, name: str, one: RollOut) -> None:
        """Make a published version the canary of an ensemble that has an active version. It replaces an earlier roll-out.

        Raises:
            EnsembleNotFoundError: no such version, or no version is active.
            StoreError: the version is the active one, or takes other inputs, so that it cannot answer the same requests.
            StoreWriteError: the store cannot be written.
        """
        self._check_canary(name, one.version)  # before anything is written
        with files.writing(self.root, lambda: f"The roll-out of {name}@{one.version} may not have begun."):
            self._records()
            with self._activations.lock():
                self._check_canary(name, one.version)  # another version may have been activated meanwhile
                self._roll_outs.write(name, one)

    def end_roll_out(self, name: str, why: str | None = None, only: str | None = None) -> bool:
        """End the roll-out of an ensemble: the active version answers all requests again.

        Args:
            name: the ensemble.
            why: the reason, which is kept in the store; None: the roll-out is removed.
            only: id of the roll-out to end; None: whichever there is.

        Returns:
            Whether there was one to end.

        Raises:
            StoreWriteError: the store cannot be written.
        """
        self._folder(name)
        with files.writing(self.root, lambda: f"The roll-out of {name} may go on."):
            self._records()
            with self._activations.lock():
                try:
                    found = self._roll_outs.read(name)
                except CorruptionError:
                    self._roll_outs.remove(name)
                    return True
                if found is None or found.ended or (only is not None and found.id != only):
                    return False
                if why is None:
                    self._roll_outs.remove(name)
                else:
                    self._roll_outs.write(name, found.model_copy(update={"ended": why}))
        return True

    def finish_activation(self, name: str, version: int) -> bool:
        """Activate a version whose publisher was stopped before it could. A version activated since then stays active.

        Returns:
            Whether the version was activated.

        Raises:
            StoreError: as for `activate`.
        """
        self._folder(name)
        if self._activations.pending(name) != version:
            return False
        self.load(name, version)
        return self._activate(name, version, only_pending=True)

    def remove(self, name: str, version: int) -> bool:
        """Remove a published version, unless it is active, about to be, or a canary. Its number is not given again.

        Returns:
            Whether it was removed.

        Raises:
            StoreReadError: the activation cannot be read.
            StoreWriteError: the store cannot be written.
        """
        home = self._folder(name)
        with files.writing(self.root), self._publishers_lock(name):
            with self._activations.lock():
                if version in (self._activations.active(name), self._activations.pending(name), self.canary(name)):
                    return False
                # A reader sees the whole version or none. If this process is killed, the next publisher removes the rest.
                gone = home / f"{_STAGING_PREFIX}removed-{version}"
                shutil.rmtree(gone, ignore_errors=True)
                numbering.give_number(self.root, name, version)
                (home / str(version)).rename(gone)
                files.sync(home)
            self.signature(name, version).unlink(missing_ok=True)
            shutil.rmtree(gone)
        return True

    def remove_remains(self, *, dry: bool = False) -> list[str]:
        """Remove what publishers that were killed have left in a bucket; in a folder the next publisher does so.

        Args:
            dry: only find it.

        Returns:
            NAME@VERSION of each.

        Raises:
            StoreReadError, StoreWriteError: the store cannot be used.
        """
        return []

    # Checking

    def verify(self, version: Version) -> None:
        """Check a version's files against its manifest.

        Raises:
            CorruptionError: a file is missing, not listed, not a regular file, or does not match its hash.
            MemberError: a member breaks the ONNX contract.
            StoreReadError: a file cannot be read.
        """
        manifest, folder = version.manifest, version.folder
        expected = {MANIFEST: version.digest, **manifest.files}
        folders = {str(parent) for path in expected for parent in Path(path).parents}
        try:
            with files.reading(folder):
                present = files.tree(folder)
                if missing := sorted(expected.keys() - present.keys()):
                    raise CorruptionError(
                        f"{version.name} lacks {', '.join(missing)}: restore the folder from a copy, or publish again."
                    )
                found = (path for path, is_folder in present.items() if not (is_folder and path in folders))
                if foreign := sorted(set(found) - expected.keys()):
                    raise CorruptionError(
                        f"{version.name} has entries that its manifest does not list: "
                        f"{', '.join(map(ascii, foreign))}. Remove them."
                    )
                for path, digest in expected.items():
                    if files.sha256(folder / path, _most_bytes(path)) != digest:
                        raise CorruptionError(
                            f"{version.name}: {path} is not the file that was published (its sha256 differs). "
                            "Restore it from a copy, or publish again."
                        )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptionError(f"{version.name} was changed while it was read: {error.filename} is gone.") from None
        for member in manifest.members:
            check_member(folder / member.file, manifest.input, len(manifest.classes))
        if manifest.bank is not None:
            check_bank(folder / "bank", manifest.input, len(manifest.classes), manifest.bank.points)
        if (calibration := manifest.calibration) is not None:
            load_answers(folder, calibration.ways, calibration.images, len(manifest.classes))
            Detector.load(folder, manifest)

    # Internal

    def copy_signature(self, version: Version, source: Store | None = None) -> None:
        """Copy the signature of a version from another store, by default the one that holds its files, if it has one.

        Raises:
            StoreWriteError: the store cannot be written.
        """
        name, number = version.manifest.name, version.manifest.version
        try:
            content = files.read((source or Store(version.folder.parents[1])).signature(name, number), _SIGNATURE_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return
        target = self.signature(name, number)
        with files.writing(self.root):
            files.make_folder(target.parent)
            target.unlink(missing_ok=True)
            files.write(target, content)
            files.sync(target.parent)
        self.keep_signature(name, number)

    def keep_signature(self, name: str, version: int) -> None:
        """Keep what was written to the file `signature`; a store in a bucket sends it there."""

    def _next_number(self, name: str) -> int:
        return numbering.next_number(self.root, name)

    def _claim(self, name: str, version: int, digest: str) -> None:
        """Reserve a number for a copied version. A folder needs nothing: the lock of `staging` keeps other publishers out."""

    def _is_published(self, name: str, version: int) -> bool:
        return _is_there(self._folder(name) / str(version))

    def _put(self, staged: Path, manifest: Manifest, digest: str, *, activate: bool) -> Version:
        """Turn a staged folder that holds its manifest into a version."""
        name, version, home = manifest.name, manifest.version, staged.parent
        target = home / str(version)
        renamed = False

        def outcome() -> str:
            if not renamed:
                return "Nothing was published."
            return not_activated(name, version) if activate else f"{name}@{version} is published, but may not last."

        with files.writing(self.root, outcome):
            for path in [*files.tree(staged), ""]:
                files.sync(staged / path)
            numbering.give_number(self.root, name, version)
            if activate:
                self._activations.announce(name, version)
            staged.rename(target)
            renamed = True
            files.sync(home)
            files.sync(self.root)
        if activate:
            self._activate(name, version)
        return Version(target, manifest, digest)

    def _activate(self, name: str, version: int, *, only_pending: bool = False) -> bool:
        replaced = False

        def outcome() -> str:
            if not replaced:
                return not_activated(name, version)
            return (
                f"{name}@{version} is active, but that may not last, and may not be recorded as the last activation; "
                f"run again: python -m models_store activate {name} {version}"
            )

        with files.writing(self.root, outcome):
            self._records()
            with self._activations.lock():
                if only_pending and self._activations.pending(name) != version:
                    return False
                names = self.names()
                self._roll_outs.remove(name)  # first: it was compared with another active version
                self._activations.replace(name, version)
                replaced = True
                self._activations.settle(name, names)
        return True

    def _finish_pending(self, name: str) -> None:
        """Activate the version that an earlier publisher announced, if it is published, and remove the announcement."""
        if (pending := self._activations.pending(name)) is not None and pending in self.versions(name):
            try:
                self.finish_activation(name, pending)
            except (StoreReadError, StoreWriteError):
                raise
            except StoreError:
                pass  # it was damaged since then and cannot be served
        self._activations.retract(name)

    def _check_canary(self, name: str, version: int) -> None:
        new, active = self.load(name, version).manifest, self.load(name).manifest
        if new.version == active.version:
            raise StoreError(f"{name}@{version} is active already, so there is nothing to roll out.")
        if new.input != active.input or new.classes != active.classes:
            what = "inputs" if new.input != active.input else "classes"
            raise StoreError(
                f"{name}@{new.version} has other {what} than the active version {active.version}, so their answers cannot stand for one another. "
                f"Publish it under another name, or activate it: python -m models_store activate {name} {new.version}"
            )

    def canary(self, name: str) -> int | None:
        """The version that is the canary of `name`; None if there is none."""
        try:
            found = self._roll_outs.read(name)
        except CorruptionError:
            return None
        return None if found is None or found.ended else found.version

    def _may_hold_versions(self, name: str) -> bool:
        try:
            return bool(self.versions(name))
        except StoreReadError:
            return True

    def _folder(self, name: str) -> Path:
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidNameError(
                f"{name[:80]!r} cannot name an ensemble: use 1 to 64 letters, digits, '.', '_' or '-', "
                "not starting with a dot or dash."
            )
        return self.root / name

    def _published(self) -> str:
        try:
            names = self.names()
        except StoreReadError as error:
            return str(error)
        return f"Published here: {', '.join(names)}." if names else "Nothing is published here."


def _files(folder: Path) -> list[str]:
    return [path for path, is_folder in files.tree(folder).items() if not is_folder]


def _is_there(path: Path) -> bool:
    """True if the path exists, also as a dangling link. True on other errors, too: reading it then gives the reason."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _most_bytes(path: str) -> int:
    if path == MANIFEST:
        return MAX_BYTES
    return MAX_MODEL_BYTES if path.endswith(".onnx") else MAX_WEIGHTS_BYTES


def not_activated(name: str, version: int) -> str:
    """What to say if a version was published, but then could not be activated."""
    return f"{name}@{version} is published but not activated; run: python -m models_store activate {name} {version}"


def concerns(error: OSError, folder: Path) -> bool:
    """True if this error came from writing below the folder; the same block also reads data sets and trains."""
    if isinstance(error.filename, str | bytes):
        return Path(os.fsdecode(error.filename)).is_relative_to(folder)
    # An error in a write to an open file carries no file name.
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
