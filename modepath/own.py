"""Import our packages `training` and `service` even if the user has modules with the same names."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType

ROOT = str(Path(__file__).parents[1])
NAMES = ("training", "service")
_kept: dict[str, ModuleType] = {}


@contextlib.contextmanager
def own_packages() -> Generator[None]:
    """Within this block `training` and `service` are our packages; afterwards the user's modules are restored."""
    theirs = {name: module for name, module in sys.modules.items() if _is_called_so(name) and not _is_ours(module)}
    for name in theirs:
        del sys.modules[name]
    for name, module in _kept.items():
        sys.modules.setdefault(name, module)
    sys.path.insert(0, ROOT)
    try:
        yield
    finally:
        sys.path.remove(ROOT)
        ours = {name: module for name, module in sys.modules.items() if _is_called_so(name) and _is_ours(module)}
        if theirs or _would_hide_theirs():
            _kept.update(ours)
            for name in ours:
                del sys.modules[name]
        sys.modules.update(theirs)


def _is_called_so(name: str) -> bool:
    return name.partition(".")[0] in NAMES


def _is_ours(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(ROOT)


def _would_hide_theirs() -> bool:
    """True if sys.path has a module with one of these names that the user's program may import later."""
    entries = [Path(entry or ".").absolute() for entry in sys.path if entry != ROOT]
    found = (entry / name for entry in entries for name in NAMES if str(entry) != ROOT)
    return any(one.with_suffix(".py").exists() or one.is_dir() for one in found)
