"""Detect the kind of a file from its first bytes, for messages about files that do not match their name."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

Kind = Literal["safetensors", "torch", "empty", "lfs", "html", "torchscript", "archive", "damaged", "text", "unknown"]

_SAID: dict[Kind, str] = {
    "safetensors": "is a safetensors file: weights without a network",
    "torch": "is a file written by torch.save",
    "empty": "is empty: its download or copy was cut short",
    "lfs": "is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`",
    "html": "is an HTML page, probably a login or error page saved instead: download the file itself",
    "torchscript": "is a TorchScript archive: code, not a state_dict",
    "archive": "is a compressed archive: unpack it first",
    "damaged": "is damaged, or its download was cut short: it begins as torch.save's files do, but its end is missing",
    "text": "is a text file",
    "unknown": "is of an unknown kind",
}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
_HEAD = 1024


def kind(file: Path) -> Kind:
    """The kind of the file.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as handle:
        head = handle.read(_HEAD)
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "lfs"
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if begin.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return "html"
    # A safetensors file begins with a length of eight bytes and a JSON object.
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < file.stat().st_size:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return _zip(file)
    if head.startswith(_COMPRESSED):
        return "archive"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"  # a pickle: torch.save before 1.6
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        return "text"
    return "unknown"


def said(file: Path) -> str:
    """Description of the file, worded to follow its name in a sentence.

    Raises:
        OSError: it cannot be read.
    """
    return _SAID[kind(file)]


def _zip(file: Path) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return "damaged"
    if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
        return "torchscript"
    return "torch" if any(name.endswith("data.pkl") for name in names) else "archive"
