"""Data sets by name, split, described, and handed out in batches.

    digits                   1797 scans of 8×8 that scikit-learn ships
    fashion-mnist            torchvision's folder, or Debian's package dataset-fashion-mnist
    cifar10, cifar100        torchvision's folder
    imagefolder:PATH         PATH/train, PATH/val, PATH/test (or less) with a folder a class
    package.module:factory   the user's own: factory() -> (train, validation, test)

The validation split chooses and calibrates; the test split is only ever reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from training import sources
from training.augment import Augment
from training.errors import DataError
from training.import_string import import_string

Batch = tuple[torch.Tensor, torch.Tensor]
MIN_CLASSES = 2


class Split(Protocol):
    """Images and labels that can be had in any order."""

    def __len__(self) -> int: ...

    def batches(self, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """Images float32 (batch, C, H, W) in [0, 1] and labels (batch,), in the given order of rows."""
        ...

    def take(self, rows: torch.Tensor) -> Split:
        """The split of these rows only."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A split as two tensors. uint8 images stand for 0 … 255 and are scaled batch by batch."""

    images: torch.Tensor  # (N, C, H, W), uint8 or float32
    labels: torch.Tensor  # (N,), int64

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """See Split."""
        for rows in order.to(self.labels.device).split(size):
            yield scale(self.images[rows]), self.labels[rows]

    def take(self, rows: torch.Tensor) -> InMemory:
        """See Split."""
        return InMemory(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> InMemory:
        """The same on a device."""
        return InMemory(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Streamed:
    """A split that is read anew each time: too large for memory, or random by itself."""

    dataset: Dataset[Any]
    workers: int

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def batches(self, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """See Split."""
        rows = [chunk.tolist() for chunk in order.split(size)]
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        loader = DataLoader(
            self.dataset, batch_sampler=rows, num_workers=self.workers, collate_fn=_collate, generator=generator,
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        for images, labels in loader:
            yield scale(images), labels

    def take(self, rows: torch.Tensor) -> Streamed:
        """See Split."""
        return Streamed(Subset(self.dataset, rows.tolist()), self.workers)


@dataclass(frozen=True)
class Data:
    """A data set, split."""

    train: Split
    validation: Split
    test: Split
    classes: list[str]
    shape: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]  # of the channels, on the train split
    std: tuple[float, ...]
    augment: Augment
    resize: Literal["refuse", "stretch", "crop"]
    fingerprint: str
    validation_cut: bool = False  # validation was set aside from the training images; the source has none of its own


@dataclass(frozen=True)
class DataOptions:
    """What the command line may say about any data set."""

    dataset: str
    validation: float = 0.1
    split_seed: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Literal["auto", "none", "crop", "flip", "crop-flip"] = "auto"
    limit: int | None = None  # images of the train split, after validation is set aside
    in_memory: Literal["auto", "yes", "no"] = "auto"
    memory_gib: float = 4.0
    workers: int = 0
    image_size: int | None = None


def load(options: DataOptions, say: Callable[[str], None] = print) -> Data:
    """Find a data set, split it and see that it keeps the contract.

    Raises:
        DataError: unknown, missing, or malformed.
        ImportStringError: an import string that leads nowhere.
    """
    found = _find(options)
    parts = [
        _hold(part, name, options) for part, name in zip(found.parts, ("train", "validation", "test"), strict=True)
    ]
    train, validation, test = parts
    if train is None or test is None:
        raise DataError(f"Data set {options.dataset!r} has no {'train' if train is None else 'test'} split.")
    validation_cut = validation is None
    if validation is None:
        train, validation = _split_off(train, options)
    if options.limit is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.split_seed + 1))
        train = train.take(order[: options.limit])
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if len(split) == 0:
            raise DataError(f"The {name} split of {options.dataset!r} is empty.")
    shapes = {tuple(next(split.batches(torch.tensor([0]), 1))[0].shape[1:]) for split in (train, validation, test)}
    if len(shapes) > 1:
        raise DataError(f"The splits of {options.dataset!r} hold images of different shapes: {sorted(shapes)}.")
    shape = shapes.pop()
    classes = found.classes or [str(c) for c in range(_largest_label(train, validation, test) + 1)]
    _check_labels(options.dataset, len(classes), train, validation, test)
    mean, std = options.mean or found.mean, options.std or found.std
    if mean is None or std is None:
        measured_mean, measured_std = _measure(train)
        mean, std = mean or measured_mean, std or measured_std
        say(f"mean {_numbers(mean)} std {_numbers(std)}, measured on {len(train)} training images")
    if len(mean) != shape[0] or len(std) != shape[0] or min(std) <= 0:
        raise DataError(f"mean and std need {shape[0]} numbers, one a channel, std positive; got {mean} and {std}.")
    return Data(
        train=train,
        validation=validation,
        test=test,
        classes=list(classes),
        shape=shape,  # pyright: ignore[reportArgumentType]
        mean=tuple(mean),
        std=tuple(std),
        augment=_augment(options.augment, found.augment, shape),
        resize=found.resize,
        fingerprint=_fingerprint(train, validation, test),
        validation_cut=validation_cut,
    )


def scale(images: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 -> float32 0 … 1; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def in_order(split: Split) -> torch.Tensor:
    """Rows 0, 1, 2, …"""
    return torch.arange(len(split))


def as_arrays(split: Split, limit: int | None = None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The first `limit` images float32 (N, C, H, W) and labels (N,) as numpy arrays."""
    parts = [
        (images.cpu().numpy(), labels.cpu().numpy()) for images, labels in split.batches(in_order(split)[:limit], 1024)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def on_device(data: Data, device: torch.device) -> Data:
    """Splits that lie in memory, moved to the device; on a GPU only if they take less than half of what is free."""
    splits = {"train": data.train, "validation": data.validation}
    held = {name: split for name, split in splits.items() if isinstance(split, InMemory)}
    if device.type == "cuda":
        needed = sum(split.images.nbytes + split.labels.nbytes for split in held.values())
        if needed > torch.cuda.mem_get_info(device)[0] / 2:
            return data
    return replace(data, **{name: split.to(device) for name, split in held.items()})


def _find(options: DataOptions) -> sources.Source:
    name = options.dataset
    if name.startswith("imagefolder:"):
        return sources.image_folder(name.removeprefix("imagefolder:"), options.image_size or 224)
    if ":" in name:
        factory = import_string(name)
        try:
            made = factory()
        except Exception as error:
            raise DataError(f"Data factory {name!r} failed with {type(error).__name__}: {error}") from error
        return sources.from_user(name, made)
    if name in sources.BUILT_IN:
        return sources.BUILT_IN[name]()
    raise DataError(
        f"Unknown data set {name!r}. Known: {', '.join(sources.BUILT_IN)}, imagefolder:PATH, or your own as package.module:factory."
    )


def _hold(part: sources.Part, name: str, options: DataOptions) -> Split | None:
    """In memory where it fits and reads the same twice, else streamed."""
    if part is None:
        return None
    if isinstance(part, tuple):
        return InMemory(*part)
    try:
        size = len(part)  # pyright: ignore[reportArgumentType]
        sample = [part[i] for i in range(min(16, size))]
        again = [part[i] for i in range(min(16, size))]
    except Exception as error:
        raise DataError(
            f"The {name} split of {options.dataset!r} cannot be read: {type(error).__name__}: {error}"
        ) from error
    for item in sample:
        _check_item(item, name, options.dataset)
    if size == 0:
        return InMemory(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))
    fits = sample[0][0].nbytes * size <= options.memory_gib * 2**30
    steady = all(torch.equal(a[0], b[0]) for a, b in zip(sample, again, strict=True))
    if options.in_memory == "no" or (options.in_memory == "auto" and not (fits and steady)):
        return Streamed(part, options.workers)
    images, labels = _collate([part[i] for i in range(size)])
    split = InMemory(images, labels)
    _check_range(split.images, name, options.dataset)
    return split


def _collate(items: list[Any]) -> Batch:
    try:
        return torch.stack([torch.as_tensor(image) for image, _ in items]), torch.tensor(
            [int(label) for _, label in items]
        )
    except RuntimeError as error:
        raise DataError(f"Images of one data set must have one shape: {error}") from None


def _check_item(item: Any, split: str, dataset: str) -> None:
    what = f"The {split} split of {dataset!r}"
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise DataError(f"{what} must give pairs (image, label); it gives {type(item).__name__}.")
    image, label = item
    if not (isinstance(image, torch.Tensor) and image.dtype == torch.float32 and image.ndim == 3):
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise DataError(
            f"{what} must give images as float32 tensors (C, H, W); it gives {found}. Convert them in the data set."
        )
    try:
        if int(label) != label:
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(f"{what} must give labels as integers; it gives {label!r}.") from None
    _check_range(image, split, dataset)


def _check_range(images: torch.Tensor, split: str, dataset: str) -> None:
    if images.dtype == torch.uint8 or images.numel() == 0:
        return
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise DataError(
            f"The {split} split of {dataset!r} has values from {low:.3g} to {high:.3g}; they must lie in [0, 1]. "
            "If they are normalised already, leave that out: it belongs in the exported graph (--mean, --std)."
        )


def _split_off(train: Split, options: DataOptions) -> tuple[Split, Split]:
    if not 0 < options.validation < 1:
        raise DataError(f"--validation is the share set aside, between 0 and 1; got {options.validation}.")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.split_seed))
    size = max(1, round(len(train) * options.validation))
    return train.take(order[size:]), train.take(order[:size])


def _labels(split: Split) -> torch.Tensor | None:
    return split.labels if isinstance(split, InMemory) else None


def _largest_label(*splits: Split) -> int:
    largest = 0
    for split in splits:
        labels = _labels(split)
        if labels is None:
            raise DataError(
                "A streamed data set must say its classes: let the factory return an object with `classes`."
            )
        largest = max(largest, int(labels.max()))
    return largest


def _check_labels(dataset: str, classes: int, *splits: Split) -> None:
    if classes < MIN_CLASSES:
        raise DataError(f"Data set {dataset!r} has {classes} class; a classifier needs at least 2.")
    for split in splits:
        labels = _labels(split)
        if labels is not None and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise DataError(
                f"Data set {dataset!r} has labels {int(labels.min())} … {int(labels.max())} but {classes} classes."
            )


def _measure(train: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    rows = in_order(train)[: 2000 if isinstance(train, Streamed) else None]
    total = squares = torch.zeros(())
    count = 0
    for images, _ in train.batches(rows, 512):
        wide = images.double()
        total = total + wide.sum(dim=(0, 2, 3))
        squares = squares + wide.square().sum(dim=(0, 2, 3))
        count += images.shape[0] * images.shape[2] * images.shape[3]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std < 1e-6, torch.ones_like(std), std)  # a constant channel is left as it is
    return tuple(round(float(m), 6) for m in mean), tuple(round(float(s), 6) for s in std)


def _augment(choice: str, own: Augment, shape: tuple[int, ...]) -> Augment:
    if choice == "auto":
        return own
    return Augment(crop=max(1, shape[1] // 8) if "crop" in choice else 0, flip="flip" in choice)


def _fingerprint(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        rows = in_order(split)[: 64 if isinstance(split, Streamed) else None]
        digest.update(str(len(split)).encode())
        if isinstance(split, InMemory):
            digest.update(split.images.contiguous().numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        else:
            for _, labels in split.batches(rows, 64):
                digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
