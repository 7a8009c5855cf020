"""Objects of one bucket: read, written whole, written only if nobody else has, listed.

obstore does the work: one Rust library for the three kinds of storage, with conditional writes, retries with backoff and uploads in
parts. Credentials come from the environment, as the tools of each cloud read it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models_store.errors import StoreError, StoreReadError, StoreWriteError

SCHEMES = ("s3", "gs", "az")
# A try may take this long, and all tries of one request together: of a request for a small object, and of one that carries a part of a file. The limit is for
# the whole body, not for the time in which nothing arrives, so a file is read and written in parts.
_TRY_SECONDS, _ALL_SECONDS = 20, 30
_PART_TRY_SECONDS, _PART_ALL_SECONDS = 300, 600
_PART_BYTES = 8 * 2**20
_TRIES = 5
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, for other servers AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}


@dataclass(frozen=True)
class Entry:
    """An object of a listing."""

    key: str
    tag: str  # changes with the content
    written: datetime.datetime


class Objects:
    """The objects below one address. Several threads may use it at once."""

    def __init__(self, address: str):
        """Open it; nothing is asked of the bucket yet.

        Args:
            address: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX.

        Raises:
            StoreError: the address is not of this form, or obstore is not installed.
        """
        self.address = address
        self._scheme = address.partition("://")[0]
        try:
            import obstore  # not everybody needs it
            import obstore.exceptions
            from obstore.store import from_url
        except ImportError:
            raise StoreError(
                f"The store {address} is object storage, which needs the package obstore: pip install 'modepath[remote]'."
            ) from None
        self._obstore: Any = obstore
        self._failures = (obstore.exceptions.BaseError, OSError)
        http = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")

        def opened(a_try: float, together: float) -> Any:
            return from_url(
                address,
                client_options={"timeout": f"{a_try}s", "connect_timeout": "5s", "allow_http": http},
                retry_config={"max_retries": _TRIES, "retry_timeout": datetime.timedelta(seconds=together)},
            )

        try:
            self._bucket = opened(_TRY_SECONDS, _ALL_SECONDS)
            self._parts = opened(_PART_TRY_SECONDS, _PART_ALL_SECONDS)  # the same bucket, for files
        except Exception as error:  # obstore's exceptions and ValueError
            raise StoreError(
                f"The store {address!r} cannot be opened: {_first_line(error)}. Give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX; "
                f"credentials come from the environment ({_CREDENTIALS.get(self._scheme, '')})."
            ) from None

    def get(self, key: str) -> tuple[bytes, str] | None:
        """The content of an object and its tag; None if there is none.

        Raises:
            StoreReadError: the bucket cannot be read.
        """
        with self._reading():
            try:
                found = self._obstore.get(self._bucket, key)
            except FileNotFoundError:
                return None
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def download(self, key: str, file: Path) -> bool:
        """Write the content of an object to a file; False if there is none.

        Raises:
            StoreReadError: the bucket cannot be read.
            OSError: the file cannot be written.
        """
        with self._reading():
            try:
                size = self._obstore.head(self._bucket, key)["size"]
            except FileNotFoundError:
                return False
        with file.open("wb") as target:
            for begin in range(0, size, _PART_BYTES):
                with self._reading():
                    try:
                        part = self._obstore.get_range(
                            self._parts, key, start=begin, end=min(begin + _PART_BYTES, size)
                        )
                    except FileNotFoundError:  # it was removed meanwhile
                        return False
                target.write(bytes(part))
        return True

    def list(self, prefix: str) -> list[Entry]:
        """All objects whose keys begin with `prefix/`, with one request for each thousand.

        Raises:
            StoreReadError: the bucket cannot be read.
        """
        with self._reading():
            found = self._obstore.list(self._bucket, prefix).collect()
        return [Entry(one["path"], str(one["e_tag"]), one["last_modified"]) for one in found]

    def put(self, key: str, content: bytes | Path) -> None:
        """Write an object; it replaces an earlier one.

        Raises:
            StoreWriteError: the bucket cannot be written.
        """
        with self._writing():
            self._obstore.put(self._parts if isinstance(content, Path) else self._bucket, key, content)

    def put_new(self, key: str, content: bytes) -> bool:
        """Write an object only if there is none; False if there is another one.

        Raises:
            StoreWriteError: the bucket cannot be written.
        """
        refused = self._obstore.exceptions.AlreadyExistsError
        return self._unless(refused, key, content, lambda: self._obstore.put(self._bucket, key, content, mode="create"))

    def put_over(self, key: str, content: bytes, tag: str | None) -> bool:
        """Write an object only if the present one has this tag (None: there is none); False if it has another one.

        Raises:
            StoreWriteError: the bucket cannot be written.
        """
        if tag is None:
            return self.put_new(key, content)
        refused = (self._obstore.exceptions.PreconditionError, FileNotFoundError)
        put = lambda: self._obstore.put(self._bucket, key, content, mode={"e_tag": tag})  # noqa: E731
        return self._unless(refused, key, content, put)

    def _unless(self, refused: Any, key: str, content: bytes, put: Callable[[], object]) -> bool:
        """Make a conditional write. obstore does not repeat one whose answer does not come, so this does."""
        began = time.monotonic()
        with self._writing():
            while True:
                try:
                    put()
                except refused:
                    # It may be ours: an earlier try succeeded, but its answer was lost.
                    found = self.get(key)
                    return found is not None and found[0] == content
                except self._failures:
                    if time.monotonic() - began >= _ALL_SECONDS:
                        raise
                    time.sleep(0.1)  # a refusal that is not of this kind comes at once
                else:
                    return True

    def delete(self, *keys: str) -> None:
        """Remove objects, those that exist.

        Raises:
            StoreWriteError: the bucket cannot be written.
        """
        with self._writing(), contextlib.suppress(FileNotFoundError):
            if keys:
                self._obstore.delete(self._bucket, list(keys))

    @contextlib.contextmanager
    def _reading(self) -> Generator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except self._failures as error:
            raise StoreReadError(self._failed("read", error)) from None

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except self._failures as error:
            raise StoreWriteError(self._failed("written", error)) from None

    def _failed(self, what: str, error: BaseException) -> str:
        return (
            f"{self.address} cannot be {what}: {_first_line(error)}. Check the address, the network, and the credentials in the environment "
            f"({_CREDENTIALS.get(self._scheme, '')})."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(". ")
