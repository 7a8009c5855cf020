"""Memory: how much this process may still take in its container, memory that processes share, and giving memory back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from pathlib import Path

import psutil  # comes with bentoml

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available_bytes() -> int:
    """Return the free memory in bytes: the minimum over the machine and all control groups around this process."""
    left = [psutil.virtual_memory().available]
    for folder in _folders():
        # A control group without a limit has the limit "max", or in version 1 a number larger than all memory.
        with contextlib.suppress(OSError, ValueError):
            left.append(_left(folder))
    return max(0, min(left))


def _folders() -> list[Path]:
    """Return the folders of this process's control groups and of their parents, for both cgroup versions."""
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
            # Inside a container the path may be that of the host, which does not exist there. The root is then the
            # container's own group.
            found += [inner, *inner.parents[: len(inner.parts) - len(root.parts)]]
    return found


def _left(folder: Path) -> int:
    new = (folder / "memory.max").exists()
    limit = int((folder / ("memory.max" if new else "memory.limit_in_bytes")).read_text())
    used = int((folder / ("memory.current" if new else "memory.usage_in_bytes")).read_text())
    wanted = "inactive_file" if new else "total_inactive_file"  # file cache, which the kernel frees on demand
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - used + sum(int(value) for name, value in lines if name == wanted)


def shared_file(name: str, size: int) -> int:
    """Create zeroed memory that child processes inherit, and return its file descriptor.

    It is not a file on a disk, so neither a full disk nor a cleaner of /tmp affects it.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as made:
            file = os.dup(made.fileno())
    os.write(file, bytes(size))
    os.set_inheritable(file, True)
    return file


def release() -> None:
    """Give memory that was freed back to the system. glibc keeps it otherwise: hundreds of MiB after members were joined."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
