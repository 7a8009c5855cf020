"""GET /ensembles/{name}/versions: the published versions of an ensemble, for people who compare them.

The store may be slow, and its manifests are read in full, so that answers are kept for a few seconds and one read serves
all who wait for it.
"""

from __future__ import annotations

import asyncio
import time

from models_store.errors import StoreError
from models_store.store import Store
from service.http.errors import DeadlineError, ForbiddenError
from service.http.schemas import VersionInfo, VersionList, describe_version
from service.inference.opening import Ensemble

SHOWN = 20  # versions
KEPT_SECONDS = 5.0
WAIT_SECONDS = 10.0


class Versions:
    """Reads the versions of one store. Used on the event loop only."""

    def __init__(self, store: Store):
        self._store = store
        self._reads: dict[str, tuple[float, int, asyncio.Task[VersionList]]] = {}  # by ensemble: time, served version

    async def of(self, ensemble: Ensemble) -> VersionList:
        """Return the newest versions of a served ensemble.

        Raises:
            ForbiddenError: the ensemble is defended; its earlier versions may share networks with it.
            DeadlineError: the store does not answer in time.
        """
        name, served = ensemble.manifest.name, ensemble.manifest.version
        if ensemble.policy.defended:
            raise ForbiddenError(f"The operator's policy for {name!r} does not show its versions.")
        known = self._reads.get(name)
        # A read that still runs is waited for, however old it is: a store that hangs must not take more threads.
        if known is None or known[1] != served or (known[2].done() and time.monotonic() - known[0] > KEPT_SECONDS):
            read = asyncio.create_task(asyncio.to_thread(self._read, name, served))
            known = self._reads[name] = time.monotonic(), served, read
        try:
            return await asyncio.wait_for(asyncio.shield(known[2]), WAIT_SECONDS)
        except TimeoutError:
            raise DeadlineError(
                f"The store did not list the versions of {name!r} within {WAIT_SECONDS:g} seconds: is its disk slow? Try again later."
            ) from None

    def _read(self, name: str, served: int) -> VersionList:
        versions: list[VersionInfo] = []
        damaged: list[int] = []
        try:
            numbers = self._store.versions(name)
        except StoreError:
            numbers = [served]
        for number in reversed(numbers[-SHOWN:]):
            try:
                manifest = self._store.load(name, number).manifest
            except StoreError:
                damaged.append(number)
            else:
                versions.append(describe_version(manifest, served=number == served))
        return VersionList(versions=versions, damaged=damaged)
