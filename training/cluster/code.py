"""The user's own code, carried to the nodes: files as they are, objects by value; and proof that a node has the same code as the command."""

from __future__ import annotations

import functools
import hashlib
import importlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.data.import_string import OBJECT, import_string, register
from training.errors import RunError
from training.optimisation.session import Session
from training.runs import NetworkPrint

REFERENCES = ("network", "loss", "optimizer")  # options that may name the user's code and that a node needs
ROOT = Path(__file__).parents[2]


def packed(options: Mapping[str, Any]) -> dict[str, bytes]:
    """By option, the content of the file, or the object, that it names; a module of a package must be on the nodes.

    Raises:
        ImportStringError: an object is not registered in this process.
    """
    found: dict[str, bytes] = {}
    for option in REFERENCES:
        value = options[option]
        if not isinstance(value, str):
            continue
        if value.startswith(OBJECT):
            pickle: Any = importlib.import_module("ray.cloudpickle")
            found[option] = pickle.dumps(import_string(value))
        elif (file := Path(value.rpartition(":")[0])).suffix == ".py" and file.is_file():
            found[option] = file.read_bytes()
    return found


def unpacked(options: Mapping[str, Any], code: Mapping[str, bytes], folder: Path) -> dict[str, Any]:
    """The options for this node. Packed objects are registered, and packed files are written into `folder`."""
    found = dict(options)
    for option, content in code.items():
        value: str = options[option]
        if value.startswith(OBJECT):
            pickle: Any = importlib.import_module("ray.cloudpickle")
            register(value.removeprefix(OBJECT), pickle.loads(content))
            continue
        named, _, attribute = value.rpartition(":")
        file = folder / option / Path(named).name
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        found[option] = f"{file}:{attribute}"
    return found


def of_command(session: Session) -> dict[str, Any]:
    """What decides the result beside the options: the network's code, the package's sources and torch."""
    network = NetworkPrint.of(session.initialised(), session.data.input)
    return {"network": network.record(), "sources": _sources(), "torch": torch.__version__}


def check(session: Session, expected: Mapping[str, Any]) -> None:
    """Compare this node with the command.

    Raises:
        RunError: the node would train something else.
    """
    node = socket.gethostname()
    own = NetworkPrint.of(session.initialised(), session.data.input)
    if expected["torch"] != torch.__version__:
        raise RunError(
            f"Node {node} has torch {torch.__version__}, the command {expected['torch']}. Install the same one on all nodes."
        )
    if expected["sources"] != _sources():
        raise RunError(
            f"Node {node} has another version of modepath than the command. Install the same one on all nodes."
        )
    if not own.is_of(dict(expected), Path()):
        raise RunError(
            f"On node {node} --network {session.config.network} is another network than where the command runs: its layers, or what they compute, "
            "differ. Install the same code on all nodes, or give it as FILE.py:FACTORY, which is sent to them."
        )


@functools.cache
def _sources() -> str:
    """sha256 of the sources that train."""
    digest = hashlib.sha256()
    for package in ("training", "models_store"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
