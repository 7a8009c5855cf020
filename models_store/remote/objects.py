"""Objects of one bucket: read, written whole, written only if nobody else has, listed.

obstore does the work: one Rust library for the three kinds of storage, with conditional writes, retries with backoff and uploads in
parts. Credentials come from the environment, as the tools of each cloud read it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models_store.errors import StoreError, StoreReadError, StoreWriteError

SCHEMES = ("s3", "gs", "az")
# A try may take this long, and all tries of one request together.
_TRY_SECONDS, _ALL_SECONDS = 20, 30
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
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        seconds = datetime.timedelta(seconds=_ALL_SECONDS)
        try:
            self._bucket: Any = from_url(
                address,
                client_options={
                    "timeout": f"{_TRY_SECONDS}s", "connect_timeout": "5s", "allow_http": endpoint.startswith("http://"),
                },
                retry_config={"max_retries": _TRIES, "retry_timeout": seconds},
            )  # fmt: skip
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
                found = self._obstore.get(self._bucket, key)
            except FileNotFoundError:
                return False
            chunks = iter(found.stream(min_chunk_size=2**20))
        with file.open("wb") as target:
            while True:
                with self._reading():
                    chunk = next(chunks, None)
                if chunk is None:
                    return True
                target.write(bytes(chunk))

    def list(self, prefix: str) -> list[Entry]:
        """All objects whose keys begin with `prefix/`, with one request for each thousand.

        Raises:
            StoreReadError: the bucket cannot be read.
        """
        with self._reading():
            found = self._obstore.list(self._bucket, prefix).collect()
        return [Entry(one["path"], str(one["e_tag"])) for one in found]

    def put(self, key: str, content: bytes | Path) -> None:
        """Write an object; it replaces an earlier one.

        Raises:
            StoreWriteError: the bucket cannot be written.
        """
        with self._writing():
            self._obstore.put(self._bucket, key, content)

    def put_new(self, key: str, content: bytes) -> bool:
        """Write an object only if there is none; False if there is another one.

        Raises:
            StoreWriteError: the bucket cannot be written.
        """
        with self._writing():
            try:
                self._obstore.put(self._bucket, key, content, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                # It may be ours: an earlier try succeeded, but its answer was lost.
                found = self.get(key)
                return found is not None and found[0] == content
        return True

    def put_over(self, key: str, content: bytes, tag: str | None) -> bool:
        """Write an object only if the present one has this tag (None: there is none); False if it has another one.

        Raises:
            StoreWriteError: the bucket cannot be written.
        """
        if tag is None:
            return self.put_new(key, content)
        with self._writing():
            try:
                self._obstore.put(self._bucket, key, content, mode={"e_tag": tag})
            except (self._obstore.exceptions.PreconditionError, FileNotFoundError):
                found = self.get(key)
                return found is not None and found[0] == content
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
