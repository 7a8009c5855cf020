"""User code by `package.module:attribute` or `path/to/file.py:attribute`, and objects that were registered."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from training.errors import ImportStringError

OBJECT = "object:"
_objects: dict[str, Any] = {}


def register(name: str, found: Any) -> None:
    """Register an object in this process under the reference `object:NAME`."""
    _objects[name] = found


def import_string(reference: str) -> Any:
    """Returns the object that `package.module:attribute`, `path/to/file.py:attribute` or `object:NAME` refers to.

    Raises:
        ImportStringError: the module cannot be imported, or has no such attribute.
    """
    if reference.startswith(OBJECT):
        name = reference.removeprefix(OBJECT)
        if name not in _objects:
            raise ImportStringError(
                f"{reference!r} was given as an object in another process: give it again, as in modepath.METHOD(network=…, data=…)."
            )
        return _objects[name]
    module_name, _, attribute = reference.rpartition(":")
    if not module_name or not attribute:
        raise ImportStringError(
            f"{reference!r} is not of the form package.module:attribute or path/to/file.py:attribute."
        )
    try:
        module = _of_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except FileNotFoundError:
        raise ImportStringError(f"{reference!r}: there is no file {module_name}.") from None
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


def _of_file(file: Path) -> ModuleType:
    """Import a file under a unique module name, so that a user's `training.py` is not mistaken for our package."""
    name = f"modepath_user_{file.resolve().as_posix()}"
    if name not in sys.modules:
        if not file.exists():
            raise FileNotFoundError(file)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
