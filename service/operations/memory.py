"""How much memory a process may still take, the limits of its container included."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil  # comes with bentoml

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available_bytes() -> int:
    """The least of what the machine and each control group around this process have left."""
    left = [psutil.virtual_memory().available]
    for folder in _folders():
        # A group without a limit says "max", or in version 1 a number beyond all memory.
        with contextlib.suppress(OSError, ValueError):
            left.append(_left(folder))
    return max(0, min(left))


def _folders() -> list[Path]:
    """Of this process's control groups and of those around them, in both versions of the file system."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found: list[Path] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            root = GROUPS if number == "0" else GROUPS / "memory"
            inner = root / path.lstrip("/")
            # Inside a container the path may be the host's, which is not there: then the root is the container's own group.
            found += [inner, *inner.parents[: len(inner.parts) - len(root.parts)]]
    return found


def _left(folder: Path) -> int:
    new = (folder / "memory.max").exists()
    limit = int((folder / ("memory.max" if new else "memory.limit_in_bytes")).read_text())
    used = int((folder / ("memory.current" if new else "memory.usage_in_bytes")).read_text())
    wanted = "inactive_file" if new else "total_inactive_file"  # cached files, which give way
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - used + sum(int(value) for name, value in lines if name == wanted)
