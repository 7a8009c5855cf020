"""The classes of a data set: from its class names, or from its labels, which must then be 0 … n − 1 without gaps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from training.data.contract import Contract, why_out_of_range
from training.errors import DataError

MIN_CLASSES = 2
SHOWN = 5  # items of a long list that a message shows
COMPARED = 16  # labels of a list that are compared with the items of the data set before the list is trusted


def settle(dataset: str, names: Sequence[str] | None, labels: Mapping[str, torch.Tensor | None]) -> list[str]:
    """The names of the classes; "0", "1", … if the source has no names.

    Args:
        dataset: its name, for messages.
        names: class names from the source.
        labels: int64 (N,) of each split; None if they are unknown before the images are read.

    Raises:
        DataError: names are not distinct, there are fewer than two classes, or labels do not fit the names; without
            names: labels are unknown or have gaps in the train split.
    """
    known = {split: found for split, found in labels.items() if found is not None}
    if names is not None:
        _check_names(dataset, names)
        for split, found in known.items():
            low, high = int(found.min()), int(found.max())
            if low < 0 or high >= len(names):
                row = int(((found < 0) | (found >= len(names))).int().argmax())
                raise DataError(
                    f"Data set {dataset!r} has labels {low} … {high} but {len(names)} classes: {int(found[row])} in the {split} split, "
                    f"row {row}. {why_out_of_range(low, high, len(names))}"
                )
        return list(names)
    if len(known) < len(labels):
        raise DataError(
            f"Data set {dataset!r} is streamed and must name its classes: let the factory return an object with `classes`, or give the data set "
            "an attribute `targets` with all labels."
        )
    low, high = (int(pick([pick(found) for found in known.values()])) for pick in (min, max))
    if low < 0:
        raise DataError(f"Data set {dataset!r} has labels {low} … {high}. {why_out_of_range(low, high, high + 1)}")
    _check_gaps(dataset, known)
    if high + 1 < MIN_CLASSES:
        raise DataError(f"Data set {dataset!r} has {high + 1} class; a classifier needs at least {MIN_CLASSES}.")
    return [str(label) for label in range(high + 1)]


def without_images(names: Sequence[str], labels: torch.Tensor) -> list[str]:
    """Names of the classes that do not occur in the labels."""
    present = set(labels.unique().tolist())
    return [name for label, name in enumerate(names) if label not in present]


def listed(values: Sequence[Any]) -> str:
    """Text for a message: the first values, and the number of the others."""
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(str, values[:SHOWN])) + more


def known_labels(dataset: Any, contract: Contract) -> torch.Tensor | None:
    """All labels of a map-style data set without reading its images, from its `targets` or `labels`; None if these are
    missing or do not agree with its items.

    Raises:
        DataError: an item that is read for comparison violates the contract.
    """
    said = _said_labels(dataset)
    if said is None:
        return None
    try:
        labels = contract.labels(said)
    except DataError:
        return None
    if len(labels) != len(dataset) or len(labels) == 0:
        return None
    # A transform may change labels, so the list is trusted only if rows with labels from the whole range agree.
    _, first = np.unique(labels.numpy(), return_index=True)
    rows = first[np.linspace(0, len(first) - 1, min(COMPARED, len(first))).astype(int)].tolist()
    _, answered = contract.read(dataset, rows)
    return labels if torch.equal(answered, labels[rows]) else None


def _said_labels(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        whole = _said_labels(dataset.dataset)
        if isinstance(whole, torch.Tensor | np.ndarray):
            return whole[list(dataset.indices)]
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    for attribute in ("targets", "labels"):
        found = getattr(dataset, attribute, None)
        if isinstance(found, torch.Tensor | np.ndarray | list | tuple):
            return found
    return None


def _check_names(dataset: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"Data set {dataset!r} has several classes of the name {listed([repr(name) for name in twice])}; predictions could not tell them "
            "apart. Give each class a different name."
        )
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"Data set {dataset!r}: the class name {name!a} is not valid Unicode. Rename the class."
            ) from None
    if len(names) < MIN_CLASSES:
        raise DataError(
            f"Data set {dataset!r} has {len(names)} class{'es' * (not names)}; a classifier needs at least {MIN_CLASSES}."
        )


def _check_gaps(dataset: str, labels: Mapping[str, torch.Tensor]) -> None:
    distinct = {split: set(found.unique().tolist()) for split, found in labels.items()}
    train, every = distinct["train"], set[int]().union(*distinct.values())
    count = max(every) + 1
    if len(train) == count:
        return
    if min(every) == 1 and len(every) == count - 1:
        raise DataError(
            f"Data set {dataset!r} has labels from 1 to {count - 1}; labels count from 0. Subtract 1, or give `classes` with {count} names."
        )
    remedy = "Map the labels to 0 … n − 1, or let the factory return an object with `classes`, one name for each label from 0."
    for split, found in distinct.items():
        if foreign := sorted(found - train):
            raise DataError(
                f"Data set {dataset!r}: the label {listed(foreign)} occurs in the {split} split but never in the train split, from which it "
                f"would have to be learned. {remedy}"
            )
    missing = list(itertools.islice((label for label in range(count) if label not in train), SHOWN))
    many = count - len(train)
    raise DataError(
        f"Data set {dataset!r} has {len(train)} different labels between {min(train)} and {count - 1}: the train split has no image of {', '.join(map(str, missing))}"
        f"{f' and {many - len(missing)} more' if many > len(missing) else ''}. {remedy}"
    )
