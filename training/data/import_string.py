"""The user's own code, named `package.module:attribute`."""

from __future__ import annotations

import importlib
from typing import Any

from training.errors import ImportStringError


def import_string(reference: str) -> Any:
    """The object that `package.module:attribute` names.

    Raises:
        ImportStringError: the module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ImportStringError(f"{reference!r} is not of the form package.module:attribute.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportStringError(
            f"{reference!r}: no module named {error.name!r}. Run from the folder that holds it, or put that folder on PYTHONPATH."
        ) from None
    except Exception as error:
        raise ImportStringError(
            f"{reference!r}: importing {module_name} failed with {type(error).__name__}: {error}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ImportStringError(f"{reference!r}: {module_name} has no attribute {attribute!r}.") from None
