"""Safe reading of files that others may have changed, and durable writing of files that must survive a crash.

Only regular files of bounded size are read. A link, a FIFO, a socket or a device is never opened, because it could lead
out of the store or block the reader forever.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Generator
from io import BufferedReader
from pathlib import Path

from models_store.errors import CorruptionError, StoreReadError, StoreWriteError

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(file: Path, limit: int) -> None:
    """Check that a file may be opened, without opening it.

    Raises:
        CorruptionError: it is not a regular file, or is larger than `limit` bytes.
        OSError: it does not exist, or the disk does not respond.
    """
    _check(file, file.lstat(), limit)


def opened(file: Path, limit: int) -> BufferedReader:
    """Open a regular file of at most `limit` bytes for reading.

    Raises:
        CorruptionError: it is not a regular file, or is larger.
        OSError: it does not exist, or the disk does not respond.
    """
    check_regular(file, limit)
    # The flags guard against a file that is replaced between the two checks.
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(file, os.fstat(descriptor), limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read(file: Path, limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes; raises as `opened` does."""
    with opened(file, limit) as handle:
        return handle.read(limit)


def sha256(file: Path, limit: int) -> str:
    """Hex digest of a regular file of at most `limit` bytes; raises as `opened` does."""
    with opened(file, limit) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tree(folder: Path) -> dict[str, bool]:
    """Relative path of every entry below a folder -> whether it is a folder. Links are listed but not followed."""
    found: dict[str, bool] = {}
    waiting = [""]
    while waiting:
        at = waiting.pop()
        with os.scandir(folder / at) as entries:
            for entry in entries:
                path = f"{at}{entry.name}"
                found[path] = entry.is_dir(follow_symlinks=False)
                if found[path]:
                    waiting.append(f"{path}/")
    return found


def cache_folder() -> Path | None:
    """The folder for what can be measured or fetched again: $MODEPATH_CACHE; else `modepath` in the user's cache folder; None
    if there is no such user.
    """
    for variable, below in (("MODEPATH_CACHE", ""), ("XDG_CACHE_HOME", "modepath"), ("HOME", ".cache/modepath")):
        if given := os.environ.get(variable):
            return Path(given) / below
    return None


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, each durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def write(file: Path, content: bytes) -> None:
    """Write a new file. Its content is durable; to make its name durable, `sync` its folder."""
    with file.open("xb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def replace(file: Path, text: str) -> None:
    """Replace a small file atomically: a reader sees the old text or the new one. `sync` its folder to make it durable.

    Call it under a lock, because it removes the temporary files of earlier calls that were killed.
    """
    clear(file)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.new")
    try:
        write(temporary, text.encode())
        temporary.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def clear(file: Path) -> None:
    """Remove what calls of `replace` for this file that were killed have left. Call it under the same lock."""
    # The token has a fixed length; otherwise the pattern for `a` would match temporary files of `a.b`.
    for stale in file.parent.glob(f".{file.name}.{'?' * 16}.new"):
        stale.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(file: Path) -> Generator[None]:
    """Wait for this lock file and hold its lock. The file is created if it is missing, and is not removed."""
    descriptor = _locked(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # closing releases the lock even if it reports an error
            os.close(descriptor)


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn an OSError into a StoreReadError, except for a missing file."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise StoreReadError(
            f"{path} cannot be read: {error.strerror or error}. "
            "Check its owner and permissions, and that the disk responds."
        ) from None


@contextlib.contextmanager
def writing(root: Path, outcome: Callable[[], str] = lambda: "Nothing was published.") -> Generator[None]:
    """Turn an OSError or a StoreReadError into a StoreWriteError.

    Args:
        root: the store's folder.
        outcome: returns what is published at that point and how to continue; called when the error occurs.
    """
    try:
        yield
    except StoreReadError as error:
        raise StoreWriteError(f"{error} {outcome()}") from None
    except OSError as error:
        why, do = _cause(error)
        raise StoreWriteError(f"Cannot write to the store {root}: {why}. {do}. {outcome()}") from None


def _cause(error: OSError) -> tuple[str, str]:
    said = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full", "Free space, or point $MODELS_STORE elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return (
            f"it is not writable ({said})",
            "Check the folder's owner and permissions, or point $MODELS_STORE elsewhere",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open ({said})", "Raise the limit: ulimit -n"
    return said, "Check the disk, and that the folder was not removed meanwhile"


def _locked(file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if (
                os.fstat(descriptor).st_uid == os.geteuid()
            ):  # everyone who may write to the folder must be able to lock it, whatever the umask
                os.fchmod(descriptor, stat.S_IMODE(file.parent.stat().st_mode) & 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held, there = os.fstat(descriptor), file.lstat()
        except FileNotFoundError:
            os.close(descriptor)
            continue
        except BaseException:
            os.close(descriptor)
            raise
        # If the file was removed during the wait, another process does not see this lock: try again.
        if os.path.samestat(held, there):
            return descriptor
        os.close(descriptor)


def _check(file: Path, status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise CorruptionError(
            f"{file} is {kind} instead of a regular file, and was not opened. Restore it from a copy, or publish again."
        )
    if status.st_size > limit:
        raise CorruptionError(
            f"{file} has {status.st_size} bytes; at most {limit} are read. Restore it from a copy, or publish again."
        )
