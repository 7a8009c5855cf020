"""The folder for what can be measured or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path | None:
    """$MODEPATH_CACHE; else `modepath` in the user's cache folder; None if there is no such user."""
    for variable, below in (("MODEPATH_CACHE", ""), ("XDG_CACHE_HOME", "modepath"), ("HOME", ".cache/modepath")):
        if given := os.environ.get(variable):
            return Path(given) / below
    return None
