"""API keys. A file holds the SHA-256 of each key, its scopes and its quota; the key itself is shown once, when it is made.

A key is 32 random bytes. So a plain hash is enough: the slow hashes for passwords protect secrets that can be guessed.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models_store.errors import ModepathError

Scope = Literal["predict", "feedback", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
MOST_KEYS = 1000
MOST_BYTES = 2**20
KEY_BYTES = 32
PREFIX = "mp"  # begins every key, so that scanners of source code recognise leaked ones
LOOK_SECONDS = 1.0  # between two looks at the file
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]

log = logging.getLogger("bentoml.modepath")


class KeyFileError(ModepathError):
    """The file of keys cannot be read or written, or is not one."""


class Key(BaseModel):
    """One key, without the key itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$", description="stands in the key, too, so that a log can name it")
    name: Name = Field(description="of the caller; several keys may have one name, while one replaces the other")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: list[Scope] = Field(min_length=1)
    rows_per_minute: int | None = Field(default=None, ge=1, description="quota; null: none")
    created: str

    def may(self, scope: Scope) -> bool:
        """Whether the key has this scope; admin has all."""
        return scope in self.scopes or "admin" in self.scopes


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key] = Field(max_length=MOST_KEYS)


def read(file: Path) -> list[Key]:
    """The keys in a file.

    Raises:
        KeyFileError: the file cannot be read, or does not hold keys.
    """
    try:
        with file.open("rb") as handle:
            content = handle.read(MOST_BYTES + 1)
    except OSError as error:
        raise KeyFileError(
            f"The file of keys {file} cannot be read: {error.strerror}. Make one: modepath keys add NAME --scope predict --file {file}"
        ) from None
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        keys = _KeyFile.model_validate_json(content, strict=True).keys
        if len({key.id for key in keys}) < len(keys):
            raise ValueError("two keys have the same id")
    except (ValidationError, ValueError) as error:
        reason = (
            f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
            if isinstance(error, ValidationError)
            else str(error)
        )
        raise KeyFileError(f"{file} is not a file of keys ({reason}). Restore it from a copy.") from None
    return keys


def add(file: Path, name: str, scopes: Sequence[Scope], rows_per_minute: int | None = None) -> str:
    """Add a key to a file, which is made if there is none, and return the key. It cannot be read again.

    Raises:
        KeyFileError: the file cannot be read or written, or the name, the scopes or the quota are not allowed.
    """
    with _locked(file):
        keys = read(file) if file.exists() else []
        if len(keys) >= MOST_KEYS:
            raise KeyFileError(f"{file} has {MOST_KEYS} keys already; revoke some: modepath keys revoke NAME")
        known = {key.id for key in keys}
        number = next(one for one in iter(lambda: secrets.token_hex(4), None) if one not in known)
        secret = f"{PREFIX}_{number}_{secrets.token_urlsafe(KEY_BYTES)}"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            key = Key(
                id=number, name=name, sha256=_digest(secret), scopes=list(dict.fromkeys(scopes)), rows_per_minute=rows_per_minute, created=now
            )  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise KeyFileError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
        _write(file, [*keys, key])
    return secret


def revoke(file: Path, name: str, number: str | None = None) -> int:
    """Remove the keys of a name, or the one of them with this id, and return how many were removed.

    Raises:
        KeyFileError: there is no such key, or the file cannot be read or written.
    """
    with _locked(file):
        keys = read(file)
        left = [key for key in keys if not (key.name == name and number in (None, key.id))]
        if len(left) == len(keys):
            known = ", ".join(f"{key.name} ({key.id})" for key in keys) or "none"
            raise KeyFileError(
                f"{file} has no key {name!r}{f' with the id {number}' if number else ''}; it has {known}."
            )
        _write(file, left)
    return len(keys) - len(left)


class Keys:
    """The keys in a file, which is read again when it changes. Used on the event loop only."""

    def __init__(self, file: Path):
        """Read the file.

        Raises:
            KeyFileError: see `read`.
        """
        self._file = file
        self._mark = _mark(file)
        self._keys = read(file)
        self._looked = time.monotonic()

    def find(self, given: str) -> Key | None:
        """The key that a caller gave; None if it is not one of them.

        Every key is compared, in a time that does not depend on which bytes agree.
        """
        self._look()
        digest, found = _digest(given), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    def _look(self) -> None:
        if (now := time.monotonic()) - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if (mark := _mark(self._file)) == self._mark:
            return
        self._mark = mark
        try:
            self._keys = read(self._file)
        except KeyFileError as error:
            log.error("%s The keys that were read before stay valid.", error)
        else:
            log.info("read %d keys from %s", len(self._keys), self._file)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _mark(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


@contextlib.contextmanager
def _locked(file: Path) -> Generator[None]:
    """Hold a lock beside the file, so that two commands do not lose each other's keys."""
    place = file.with_name(f".{file.name}.lock")
    try:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise KeyFileError(f"{place} cannot be written: {error.strerror}.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(file: Path, keys: Sequence[Key]) -> None:
    content = json.dumps({"keys": [key.model_dump() for key in keys]}, indent=2) + "\n"
    temporary = file.with_name(f".{file.name}.new")
    try:
        # Kept from other users: it has no key, but names callers.
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(handle, "w") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    except OSError as error:
        raise KeyFileError(f"{file} cannot be written: {error.strerror}.") from None
