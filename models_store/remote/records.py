"""The small objects of a store in a bucket: what is published, active, and rolled out.

manifests/<name>/<number>.json   the manifest, written last: a version is published when it is there
numbers/<name>/<number>          claimed by a publisher, and never removed
active/<name>                    the version that is served, as JSON
pending/<name>/<number>          a version to activate once it is published; it remains if the publisher is killed in between
rollouts/<name>                  the roll-out of an ensemble, and the activation that it is compared with, as JSON
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Collection, Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

from models_store.errors import CorruptionError, StoreWriteError
from models_store.records.activation import Activations
from models_store.records.numbering import NUMBER
from models_store.records.rollout import RollOut, RollOuts
from models_store.remote.objects import Objects

# A listing serves all reads within this time, or within the time that it took if that was longer, so that a look at a thousand
# ensembles takes a few requests.
FRESH_SECONDS = 0.25
_TRIES = 20  # of a conditional write


class Listing:
    """The objects below one prefix, listed at most every FRESH_SECONDS, and their contents, read once each."""

    def __init__(self, objects: Objects, prefix: str):
        self._objects = objects
        self._prefix = prefix
        self._lock = threading.Lock()
        self._stale = float("-inf")
        self._tags: Mapping[str, str] = {}
        self._contents: dict[tuple[str, str], bytes] = {}

    def tags(self) -> Mapping[str, str]:
        """The tag of each object, by its key without the prefix.

        Raises:
            StoreReadError: the bucket cannot be read.
        """
        with self._lock:
            began = time.monotonic()
            if began > self._stale:
                found = self._objects.list(self._prefix)
                self._tags = {one.key.removeprefix(f"{self._prefix}/"): one.tag for one in found}
                self._contents = {at: held for at, held in self._contents.items() if self._tags.get(at[0]) == at[1]}
                ended = time.monotonic()
                self._stale = ended + max(FRESH_SECONDS, ended - began)
            return self._tags

    def content(self, key: str) -> bytes | None:
        """The content of an object; None if there is none.

        Raises:
            StoreReadError: the bucket cannot be read.
        """
        tag = self.tags().get(key)
        if tag is None:
            return None
        if (held := self._contents.get((key, tag))) is not None:
            return held
        if (found := self._objects.get(f"{self._prefix}/{key}")) is None:
            return None
        self._contents[key, found[1]] = found[0]
        return found[0]

    def forget(self) -> None:
        """List again at the next read, because this process wrote."""
        with self._lock:
            self._stale = float("-inf")


class _Active(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int
    order: int  # ascending with each activation in the store
    token: str  # another one for each activation


class RemoteActivations(Activations):
    """The activations of a store in a bucket; see Activations. Nothing is locked: writes are conditional."""

    def __init__(self, objects: Objects, published: Listing):
        self._objects = objects
        self._published = published
        self._listing = Listing(objects, "active")

    def active(self, name: str) -> int | None:
        """See Activations."""
        found = self._read(name)
        return found and found.version

    def token(self, name: str) -> str | None:
        """See Activations."""
        found = self._read(name)
        return found and found.token

    def order(self, names: Collection[str]) -> list[str]:
        """See Activations."""
        found: dict[str, int] = {}
        for name in set(names) & self._listing.tags().keys():
            with contextlib.suppress(CorruptionError):
                if (one := self._read(name)) is not None:
                    found[name] = one.order
        return sorted(found, key=lambda name: (found[name], name))

    def names(self) -> Collection[str]:
        """Names of the ensembles that have an active version."""
        return self._listing.tags().keys()

    def pending(self, name: str) -> int | None:
        """See Activations. Versions that are not published yet, or older than the active one, are left out."""
        found = [number for number in self._announced(name) if f"{name}/{number}.json" in self._published.tags()]
        newest = max(found, default=0)
        return newest if newest > (self.active(name) or 0) else None

    def announce(self, name: str, version: int) -> None:
        """See Activations."""
        self._objects.put(f"pending/{name}/{version}", b"")

    def retract(self, name: str) -> None:
        """Remove the announcements of versions up to the active one."""
        active = self.active(name) or 0
        self._withdraw(name, [number for number in self._announced(name) if number <= active])

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: writes are conditional instead."""
        return contextlib.nullcontext()

    def replace(self, name: str, version: int) -> None:
        """See Activations."""
        self.serve(name, version)

    def serve(self, name: str, version: int, *, only_newer: bool = False) -> bool:
        """Serve this version from now on, with `only_newer` unless a newer one is active. Returns whether it is active now."""
        key = f"active/{name}"
        for _ in range(_TRIES):
            found = self._objects.get(key)
            before = None
            with contextlib.suppress(CorruptionError):
                before = found and _parsed(found[0], key, name)
            if only_newer and before is not None and before.version > version:
                return False
            order = max(time.time_ns(), before.order + 1 if before else 0)
            one = _Active(version=version, order=order, token=secrets.token_hex(8))
            if self._objects.put_over(key, one.model_dump_json().encode(), found and found[1]):
                self._listing.forget()
                return True
        raise StoreWriteError(
            f"active/{name} is written by others again and again. Run: python -m models_store activate {name} {version}"
        )

    def remove(self, name: str) -> None:
        """See Activations."""
        self._objects.delete(f"active/{name}")
        self._listing.forget()

    def settle(self, name: str, names: Collection[str]) -> None:
        """Remove the announcements of all published versions: what was done now is later than their publication."""
        self._published.forget()
        tags = self._published.tags()
        self._withdraw(name, [number for number in self._announced(name) if f"{name}/{number}.json" in tags])

    def _withdraw(self, name: str, numbers: Collection[int]) -> None:
        self._objects.delete(*(f"pending/{name}/{number}" for number in numbers))

    def _read(self, name: str) -> _Active | None:
        content = self._listing.content(name)
        return None if content is None else _parsed(content, f"active/{name}", name)

    def _announced(self, name: str) -> list[int]:
        keys = (entry.key.rpartition("/")[2] for entry in self._objects.list(f"pending/{name}"))
        return [int(number) for number in keys if NUMBER.fullmatch(number)]


class _Bound(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    against: str | None  # token of the activation that the canary is compared with
    roll_out: RollOut


class RemoteRollOuts(RollOuts):
    """The roll-outs of a store in a bucket; see RollOuts.

    Nothing is locked, so a roll-out holds the token of the activation it was begun beside: with the next one it no
    longer counts.
    """

    def __init__(self, objects: Objects, activations: RemoteActivations):
        self._objects = objects
        self._activations = activations
        self._listing = Listing(objects, "rollouts")

    def read(self, name: str) -> RollOut | None:
        """See RollOuts."""
        if (content := self._listing.content(name)) is None:
            return None
        try:
            found = _Bound.model_validate_json(content, strict=True)
        except ValidationError as error:
            raise CorruptionError(
                f"rollouts/{name} is not a roll-out ({error.errors()[0]['msg']}). Run: python -m models_store rollout {name} --end"
            ) from None
        return found.roll_out if found.against == self._activations.token(name) else None

    def write(self, name: str, one: RollOut) -> None:
        """See RollOuts."""
        bound = _Bound(against=self._activations.token(name), roll_out=one)
        self._objects.put(f"rollouts/{name}", bound.model_dump_json().encode())
        self._listing.forget()

    def remove(self, name: str) -> None:
        """See RollOuts."""
        if self._objects.get(f"rollouts/{name}") is not None:
            self._objects.delete(f"rollouts/{name}")
        self._listing.forget()


def claim_number(objects: Objects, name: str, above: int) -> int:
    """The smallest free number of `name` above this one, claimed for this publisher.

    Raises:
        StoreReadError, StoreWriteError: the bucket cannot be used.
    """
    keys = (entry.key.rpartition("/")[2] for entry in objects.list(f"numbers/{name}"))
    number = max([above, *(int(key) for key in keys if NUMBER.fullmatch(key))]) + 1
    publisher = json.dumps({"publisher": secrets.token_hex(8)}).encode()
    while not objects.put_new(f"numbers/{name}/{number}", publisher):
        number += 1
    return number


def claim_this_number(objects: Objects, name: str, number: int, digest: str) -> bool:
    """Claim a number that a copied version brings; False if it is somebody else's.

    An earlier copy of the same version that was not completed may have claimed it: then it is ours.
    """
    return objects.put_new(f"numbers/{name}/{number}", json.dumps({"copy of": digest}).encode())


def _parsed(content: bytes, key: str, name: str) -> _Active:
    try:
        return _Active.model_validate_json(content, strict=True)
    except ValidationError:
        raise CorruptionError(
            f"{key} does not hold the number of a version. Run: python -m models_store activate {name} VERSION"
        ) from None
