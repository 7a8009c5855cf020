"""The command-line options that concern the data set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from training.data.forms import Missing


@dataclass(frozen=True)
class DataOptions:
    """The command-line options that concern the data set."""

    dataset: str
    validation: float = 0.1
    split_seed: int = 0
    stratify: bool = False  # whether the rows set aside for validation have the shares of the classes
    group: str | None = None  # column of a table, or pattern of image files: rows of one group are not divided
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Literal["auto", "none", "crop", "flip", "crop-flip"] = "auto"
    transforms: tuple[str, ...] = ()
    limit: int | None = None  # images of the train split, after validation is set aside
    in_memory: Literal["auto", "yes", "no"] = "auto"
    memory_gib: float = 4.0
    workers: int = 0
    image_size: int | None = None
    hold_out: tuple[str, ...] = ()
    label: str | None = None  # the column of a table that holds the classes
    drop: tuple[str, ...] = ()  # columns of a table that are not used
    text: str | None = None  # the column of a table that holds a text, for the tokenizer
    tokenizer: str | None = None  # file tokenizer.json
    longest: int | None = None  # tokens of a text; the tokenizer cuts longer ones
    missing: Missing = "refuse"

    def of_other(self, dataset: str) -> DataOptions:
        """The options to read another data set with: without those that only the first one has a meaning for."""
        kept = replace(self, dataset=dataset, transforms=(), group=None)
        if dataset.startswith(("csv:", "parquet:")):
            return kept
        return replace(kept, label=None, drop=(), text=None, tokenizer=None, longest=None)
