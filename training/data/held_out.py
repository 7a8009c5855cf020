"""Classes that are held out of a data set: their images are foreign to the network, and yet close to its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from training.data.classes import MIN_CLASSES, listed
from training.data.in_memory import InMemory
from training.data.streaming import Streamed
from training.errors import DataError

Split = TypeVar("Split", InMemory, Streamed)


def remaining(dataset: str, names: Sequence[str], held: Sequence[str]) -> list[str]:
    """The classes that are left.

    Raises:
        DataError: a held-out class is unknown, or fewer than two are left.
    """
    if unknown := sorted(set(held) - set(names)):
        raise DataError(f"--hold-out: {dataset!r} has no class {listed(unknown)}. Its classes: {', '.join(names)}.")
    left = [name for name in names if name not in held]
    if len(left) < MIN_CLASSES:
        raise DataError(
            f"--hold-out leaves {len(left)} class of {dataset!r}; a classifier needs at least {MIN_CLASSES}."
        )
    return left


def without(split: Split, what: str, names: Sequence[str], held: Sequence[str]) -> Split:
    """The split without the images of the held-out classes; the other classes are numbered 0, 1, … in their order.

    Args:
        split: a split.
        what: its name, for messages.
        names: all classes.
        held: the classes to leave out.
    """
    numbers = iter(range(len(names)))
    new = torch.tensor([-1 if name in held else next(numbers) for name in names])
    left = split.take(kept(split, what, names, held))
    if isinstance(left, InMemory):
        return replace(left, labels=new[left.labels])
    assert left.labels is not None
    contract = replace(left.contract, classes=len(names))
    return replace(left, contract=contract, labels=new[left.labels], new_labels=new)


def kept(split: InMemory | Streamed, what: str, names: Sequence[str], held: Sequence[str]) -> torch.Tensor:
    """The rows of the other classes; arguments as for `without`."""
    stays = torch.tensor([name not in held for name in names])
    return torch.nonzero(stays[_labels(split, what)]).flatten()


def only(split: InMemory | Streamed, what: str, names: Sequence[str], held: Sequence[str]) -> InMemory | Streamed:
    """The images of the held-out classes; arguments as for `without`."""
    chosen = torch.tensor([name in held for name in names])
    return split.take(torch.nonzero(chosen[_labels(split, what)]).flatten())


def _labels(split: InMemory | Streamed, what: str) -> torch.Tensor:
    if split.labels is None:
        raise DataError(
            f"{what} cannot hold out classes, because its labels are unknown before the images are read. Give the data set an attribute "
            "`targets` with all labels, or --in-memory yes."
        )
    return split.labels
