"""Rare classes: weights of classes in the loss, and how often each row is drawn in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.errors import ConfigError, DataError

BALANCED = "balanced"


def class_weights(given: Sequence[str], labels: torch.Tensor | None, classes: Sequence[str]) -> torch.Tensor | None:
    """The weight of each class in the loss, (classes,), such that the mean weight of the training rows is 1.

    Args:
        given: nothing; "balanced", which weighs each class by the inverse of its number of rows; or a number for each class.
        labels: of the training rows, if they are known.
        classes: names of the classes.

    Raises:
        ConfigError: `given` is none of these.
        DataError: the labels are unknown.
    """
    if not given:
        return None
    counts = _counts(labels, len(classes), "--class-weights")
    if tuple(given) == (BALANCED,):
        weights = 1 / counts.clamp_min(1)
    else:
        try:
            weights = torch.tensor([float(one) for one in given], dtype=torch.float64)
        except ValueError:
            raise ConfigError(
                f"--class-weights is {BALANCED}, or a number for each class; got {' '.join(given)}."
            ) from None
        if len(weights) != len(classes) or not bool((weights.isfinite() & (weights >= 0)).all()) or not weights.any():
            raise ConfigError(
                f"--class-weights needs {len(classes)} numbers of at least 0, one for each class ({', '.join(classes)}); got {' '.join(given)}."
            )
    return (weights * counts.sum() / (weights * counts).sum()).float()


def row_weights(labels: torch.Tensor | None, classes: int) -> torch.Tensor:
    """How often each training row is drawn, (N,), such that each class is drawn equally often.

    Raises:
        DataError: the labels are unknown.
    """
    counts = _counts(labels, classes, "--draw balanced")
    assert labels is not None, "otherwise they are not counted"
    return (1 / counts.clamp_min(1))[labels.cpu()]


def drawn(weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """The rows of an epoch, (count,), drawn with replacement by their weights (N,)."""
    # torch.multinomial takes at most 2^24 weights; this takes any number.
    total = weights.double().cumsum(0)
    places = torch.rand(count, dtype=torch.float64, generator=generator) * total[-1]
    return torch.searchsorted(total, places, right=True).clamp_max(len(weights) - 1)


def _counts(labels: torch.Tensor | None, classes: int, option: str) -> torch.Tensor:
    if labels is None:
        raise DataError(
            f"{option} needs the labels of all training rows, which are unknown before they are read. Give the data set an attribute "
            "`targets` with all labels, or --in-memory yes."
        )
    return torch.bincount(labels.cpu(), minlength=classes).double()
