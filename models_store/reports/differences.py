"""What differs between two published versions, by their manifests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from models_store.manifest import Manifest

Difference = tuple[str, Any, Any]  # field, value in the first version, value in the second; None where it is missing
_NUMBERED = ("members", "files", "digest")  # summarised, or different in any two versions
_WIDTH = 60  # characters of a value


def differences(first: Manifest, second: Manifest) -> list[Difference]:
    """Fields whose values differ, by dotted name: scores and options first to last as in FORMAT.md, then files."""
    before, after = (dict(_flat(_fields(one))) for one in (first, second))
    names = list(dict.fromkeys(itertools.chain(before, after)))
    found: list[Difference] = [
        (name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    ]
    hashes = {path: digest for path, digest in first.files.items() if path.startswith("members/")}
    others = {path: digest for path, digest in second.files.items() if path.startswith("members/")}
    if hashes != others:
        shared = len(set(hashes.values()) & set(others.values()))
        found.append(("members that both have", shared, shared))
    return found


def table(found: Sequence[Difference], names: tuple[str, str]) -> list[str]:
    """Lines of text: a head, and one line for each difference."""
    if not found:
        return [f"{names[0]} and {names[1]} differ in nothing but their number and time"]
    rows = [("", *names), *((field, _text(before), _text(after)) for field, before, after in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows]


def _fields(manifest: Manifest) -> dict[str, Any]:
    record = manifest.model_dump(mode="json", exclude=set(_NUMBERED))
    scores = [member.validation.accuracy for member in manifest.members if member.validation]
    record["members"] = {
        "count": len(manifest.members),
        **({"accuracy": f"{min(scores):.4f} to {max(scores):.4f}"} if scores else {}),
    }
    return record


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
