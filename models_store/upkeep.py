"""Upkeep of a store: which old versions may be removed, and copies of a whole store. A service may run meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from models_store.errors import EnsembleNotFoundError, StoreError
from models_store.manifest import Manifest
from models_store.store import Store

_REFERENCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@([1-9][0-9]{0,17}))?(?:/[0-9]+)?")


@dataclass
class Outcome:
    """What was done: versions as NAME@VERSION, and what could not be read, with the reason."""

    done: list[str] = field(default_factory=list[str])
    kept: dict[str, str] = field(default_factory=dict[str, str])  # version -> why
    damaged: dict[str, str] = field(default_factory=dict[str, str])


def collect_garbage(store: Store, keep: int, *, dry: bool = False) -> Outcome:
    """Remove the versions of each ensemble but the newest ones, those that are active or canaries, and those that others are based on.

    Nothing is removed while a manifest cannot be read: what it is based on is then unknown.

    Args:
        store: the store.
        keep: number of the newest versions of each ensemble that stay.
        dry: only say what would be removed.

    Raises:
        StoreError: the store cannot be read or written.
    """
    outcome = Outcome()
    manifests: dict[tuple[str, int], Manifest] = {}
    for name, version in _all(store):
        try:
            manifests[name, version] = store.load(name, version).manifest
        except StoreError as error:
            outcome.damaged[f"{name}@{version}"] = str(error)
    if outcome.damaged:
        return outcome
    bases = {base: f"{name}@{version}" for (name, version), one in manifests.items() for base in _bases(one, manifests)}
    for name in store.names():
        versions = store.versions(name)
        for version in versions[: max(0, len(versions) - keep)]:
            shown = f"{name}@{version}"
            if (name, version) in bases:
                outcome.kept[shown] = f"{bases[name, version]} is based on it"
            elif _active(store, name) == version:
                outcome.kept[shown] = "it is active"
            elif store.canary(name) == version or not (dry or store.remove(name, version)):
                outcome.kept[shown] = "it is a canary, or was just activated"
            else:
                outcome.done.append(shown)
    outcome.done += [f"the remains of {shown}" for shown in store.remove_remains(dry=dry)]
    return outcome


def copy_all(source: Store, target: Store) -> Outcome:
    """Copy every version that the target lacks, each verified, and then activate what is active in the source.

    Raises:
        StoreError: the source cannot be listed, or the target cannot be written.
    """
    outcome = Outcome()
    for name, version in _all(source):
        shown = f"{name}@{version}"
        if version in target.versions(name):
            if target.digest(name, version) != source.digest(name, version):
                outcome.damaged[shown] = "the target has another version of this name and number"
            else:
                target.copy_signature(target.load(name, version), source)  # it may have been signed since
            continue
        try:
            found = source.load(name, version)
        except StoreError as error:
            outcome.damaged[shown] = str(error)
            continue
        target.adopt(found, activate=False)
        outcome.done.append(shown)
    for name in source.activation_order():
        version = _active(source, name)
        if version is not None and version in target.versions(name) and _active(target, name) != version:
            target.activate(name, version)
    return outcome


def _all(store: Store) -> list[tuple[str, int]]:
    return [(name, version) for name in store.names() for version in store.versions(name)]


def _active(store: Store, name: str) -> int | None:
    try:
        return store.active(name)
    except EnsembleNotFoundError:
        return None


def _bases(manifest: Manifest, manifests: dict[tuple[str, int], Manifest]) -> Iterator[tuple[str, int]]:
    """The versions that a training began from, by the options that name them."""
    for text in _texts(manifest.provenance.config):
        if (match := _REFERENCE.fullmatch(text)) is None:
            continue
        name, version = match[1], match[2]
        if version is not None:
            yield name, int(version)
            continue
        # Without a number it was the active one. The newest of that time is the best guess; older ones were active for sure
        # only if somebody went back.
        older = [
            number for (other, number), one in manifests.items() if other == name and one.created <= manifest.created
        ]
        own = (manifest.name, manifest.version)
        if candidates := [number for number in older if (name, number) != own]:
            yield name, max(candidates)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a configuration but those of options that name something else."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in cast("list[Any]", value):
            yield from _texts(one)
    elif isinstance(value, dict):
        for key, one in cast("dict[str, Any]", value).items():
            if key not in ("name", "door", "dataset", "network"):
                yield from _texts(one)
