"""Loads data sets by name, splits them, describes them, and returns batches.

    digits                   1797 scans of 8×8 that scikit-learn ships
    breast-cancer, wine      tables that scikit-learn ships
    digit-rows               the digits as signals: 8 steps of 8 values
    languages                names in ten languages, as bytes; Babel ships them
    fashion-mnist            torchvision's folder, or Debian's package dataset-fashion-mnist
    cifar10, cifar100        torchvision's folder
    imagefolder:PATH         PATH/train, PATH/val, PATH/test (or less), each with one folder per class
    npz:PATH                 arrays x and y, optionally x_validation, y_validation, x_test, y_test
    csv:PATH, parquet:PATH   a table with named columns, one of which is the label
    package.module:factory   the user's own: factory() -> (train, validation, test)

forms/, contract.py, in_memory.py, streaming.py and classes.py define which forms of splits are accepted, and the requirements on them.
The validation split is used for choices and calibration; the test split is used for reports only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from models_store.inputs import kinds
from models_store.manifest import InputSpec
from training.data import classes, held_out, splitting, transforms
from training.data.augment import Augment
from training.data.contract import Contract
from training.data.forms import FeatureForm, Form, TokenForm, named
from training.data.in_memory import InMemory
from training.data.options import DataOptions
from training.data.sources import Part, image_folder
from training.data.sources.find import FOLDER, find
from training.data.streaming import Streamed
from training.data.transforms import Apply, Mixing, Transformed
from training.errors import DataError

SAMPLED = 16  # rows that are read twice, to detect a data set that returns random images
READ_AT_ONCE = 256
SEEN_IMAGES, SEEN_OF_EACH_CLASS = 5000, 50  # images that novelty is fitted on: the larger number
NUMBERS_SHOWN = 12  # means in a note

NO_MIXING = Mixing()

Split = InMemory | Streamed


@dataclass(frozen=True)
class Data:
    """A data set, split."""

    train: Split
    validation: Split
    test: Split
    classes: list[str]
    input: InputSpec  # kind and shape of the inputs
    mean: tuple[float, ...]  # along the first axis (channels, features), by default measured on the train split
    std: tuple[float, ...]  # as `mean`; both are empty for tokens
    augment: Apply
    fingerprint: str
    validation_cut: bool = False  # True if the source has no validation split, so that training images were set aside
    notes: tuple[str, ...] = ()  # information for the log
    warnings: tuple[str, ...] = ()  # problems that will probably spoil a training
    mix: Mixing = NO_MIXING  # mixup and cutmix of training batches
    tokenizer: bytes | None = None  # content of a tokenizer.json, if the inputs are texts
    weights: torch.Tensor | None = None  # (N,): how often each row of the train split is drawn, if the source says so

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input: (C, H, W) of images."""
        return self.input.shape


def load(options: DataOptions) -> Data:
    """Load a data set, split it, and check that it meets the contract.

    Raises:
        DataError: the data set is unknown, missing or malformed.
        ImportStringError: the data set's import string cannot be imported.
    """
    found = find(options)
    notes, warnings = list(found.notes), list[str]()
    form = found.form
    if options.missing == "mean":
        if not isinstance(form, FeatureForm):
            raise DataError(f"--missing mean is for features; {options.dataset!r} has none.")
        form = replace(form, missing="mean")
    train = _hold(found.parts[0], "train", options, found.classes, form)
    validation, test = (
        _hold(part, name, options, found.classes, form)
        for part, name in zip(found.parts[1:], ("validation", "test"), strict=True)
    )
    if isinstance(form, TokenForm) and form.longest is None:
        form = form.of_length(max(split.shape[0] for split in (train, validation, test) if split is not None))
        train, validation, test = (_filled(split, form) for split in (train, validation, test))
    if train is None or test is None:
        raise DataError(f"Data set {options.dataset!r} has no {'train' if train is None else 'test'} split.")
    given = {"train": train, "validation": validation, "test": test}
    names = classes.settle(
        options.dataset, found.classes, {name: split.labels for name, split in given.items() if split is not None}
    )
    rows = in_order(train)  # of the source's train split
    for what, values in (("groups", found.groups), ("weights", found.weights)):
        if values is not None and len(values) != len(rows):
            raise DataError(
                f"{options.dataset!r} gives {len(values)} {what} for {len(rows)} training {kinds.NOUNS[form.spec(train.shape).kind]}s."
            )
    if options.hold_out:
        left = held_out.remaining(options.dataset, names, options.hold_out)
        rows = held_out.kept(train, f"The train split of {options.dataset!r}", names, options.hold_out)
        train, validation, test = (
            split and held_out.without(split, f"The {name} split of {options.dataset!r}", names, options.hold_out)
            for name, split in given.items()
        )
        names = left
    validation_cut = validation is None
    if validation is None:
        stay, aside = _set_aside(
            train, options, None if found.groups is None else [found.groups[i] for i in rows.tolist()]
        )
        if found.groups is not None:
            notes += splitting.note(len(aside), len(train), options.validation, "validation")
        train, validation, rows = train.take(stay), train.take(aside), rows[stay]
    if options.limit is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.split_seed + 1))
        train, rows = train.take(order[: options.limit]), rows[order[: options.limit]]
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if len(split) == 0:
            raise DataError(f"The {name} split of {options.dataset!r} is empty.")
    shapes = {split.shape for split in (train, validation, test)}
    if len(shapes) > 1:
        raise DataError(f"The splits of {options.dataset!r} hold inputs of different shapes: {sorted(shapes)}.")
    shape = shapes.pop()
    spec = form.spec(shape)
    train, validation, test = (_expecting(split, len(names)) for split in (train, validation, test))
    if train.labels is not None and (absent := classes.without_images(names, train.labels)):
        warnings.append(
            f"no training {kinds.NOUNS[spec.kind]} of {len(absent)} of {len(names)} classes: {classes.listed(absent)}. The networks cannot learn them."
        )
    mean, std = options.mean or found.mean, options.std or found.std
    if spec.kind == "tokens":
        if mean or std:
            raise DataError("--mean and --std are for images and features; token ids are not normalised.")
        mean, std = (), ()
    elif mean is None or std is None:
        measured_mean, measured_std = _measure(train, spec)
        mean, std = mean or measured_mean, std or measured_std
        listed = (
            f"mean {_numbers(mean)} std {_numbers(std)}" if len(mean) <= NUMBERS_SHOWN else f"{len(mean)} means and std"
        )
        notes.append(f"{listed}, measured on {len(train)} training {kinds.NOUNS[spec.kind]}s")
    if spec.kind != "tokens" and (len(mean) != shape[0] or len(std) != shape[0] or min(std) <= 0):
        what = "channel" if spec.kind == "image" else "feature"
        raise DataError(
            f"mean and std need {shape[0]} numbers, one for each {what}, and std must be positive; got {mean} and {std}."
        )
    augment = _augment(options, found.augment, spec)
    if options.transforms and spec.kind != "image":
        raise DataError(f"--transforms are for images; {options.dataset!r} has {spec.kind}.")
    each, mix = transforms.parse(options.transforms, shape, len(names))
    return Data(
        train=train,
        validation=validation,
        test=test,
        classes=names,
        input=spec,
        mean=tuple(mean),
        std=tuple(std),
        augment=Transformed(augment, each) if each else augment,
        mix=mix,
        tokenizer=form.tokenizer if isinstance(form, TokenForm) else None,
        weights=None if found.weights is None else torch.as_tensor(found.weights, dtype=torch.float64)[rows],
        fingerprint=_fingerprint(
            (train, validation, test), form.tokenizer if isinstance(form, TokenForm) else None, found.weights
        ),
        validation_cut=validation_cut,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def foreign(options: DataOptions, limit: int | None = None) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Inputs of a data set whose classes do not matter, (N, *shape), at most `limit`; and notes for the log.

    Uses the test split, or for a folder of images without splits, every image below it. Unreadable files are left out. With
    `hold_out`, uses the images of these classes only.

    Raises:
        DataError: the data set is unknown, missing or malformed, or has no readable image.
    """
    if options.dataset.startswith(FOLDER) and not options.hold_out:
        path, size = options.dataset.removeprefix(FOLDER), options.image_size or image_folder.SIZE
        files, notes = image_folder.foreign(path, size)
        images: list[torch.Tensor] = []
        unreadable: list[str] = []
        for row in range(len(files)):
            if len(images) == limit:
                break
            try:
                images.append(files[row][0])
            except DataError as error:
                unreadable.append(str(error))
        if not images:
            raise DataError(f"{options.dataset}: none of {len(files)} images can be read. {unreadable[0]}")
        if unreadable:
            notes = (*notes, f"warning: {len(unreadable)} files cannot be read and are left out, as {unreadable[0]}")
        return torch.stack(images).numpy(), list(notes)
    found = find(options)
    split = _hold(found.parts[2], "test", options, found.classes, found.form)
    if split is None:
        raise DataError(f"Data set {options.dataset!r} has no test split.")
    if options.hold_out:
        names = classes.settle(options.dataset, found.classes, {"test": split.labels})
        split = held_out.only(split, f"The test split of {options.dataset!r}", names, options.hold_out)
    return as_arrays(split, limit)[0], list(found.notes)


def in_order(split: Split) -> torch.Tensor:
    """Rows 0, 1, 2, …"""
    return torch.arange(len(split))


def as_arrays(split: Split, limit: int | None = None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The first `limit` inputs (N, *shape) and labels (N,) as numpy arrays."""
    parts = [
        (images.cpu().numpy(), labels.cpu().numpy()) for images, labels in split.batches(in_order(split)[:limit], 1024)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def seen_images(
    data: Data, name: str, most: int | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]:
    """Random images of the train split without augmentation, their labels, and what they are: see calibrating.Labelled."""
    wanted = max(SEEN_IMAGES, SEEN_OF_EACH_CLASS * len(data.classes)) if most is None else most
    count = min(len(data.train), wanted)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:count]
    return (*as_arrays(data.train.take(chosen)), f"{count} images of the train split of {name}")


def on_device(data: Data, device: torch.device) -> Data:
    """Move in-memory train and validation splits to the device; to a GPU only if they fit into half of its memory."""
    splits = {"train": data.train, "validation": data.validation}
    held = {name: split for name, split in splits.items() if isinstance(split, InMemory)}
    if device.type == "cuda":
        needed = sum(split.images.nbytes + split.labels.nbytes for split in held.values())
        if needed > torch.cuda.mem_get_info(device)[0] / 2:
            return data
    return replace(data, **{name: split.to(device) for name, split in held.items()})


def _hold(part: Part, name: str, options: DataOptions, names: Sequence[str] | None, form: Form) -> Split | None:
    """Load a split into memory if it fits and two reads agree; otherwise stream it."""
    if part is None:
        return None
    contract = Contract(f"The {name} split of {options.dataset!r}", names, form=form)
    texts = isinstance(form, TokenForm) and isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], list)
    if isinstance(part, tuple | list) and len(part) and (texts or isinstance(part[0], torch.Tensor | np.ndarray)):
        if len(part) != 2:
            raise DataError(f"{contract.what} has {len(part)} parts; give (images, labels).")
        return InMemory(*contract.arrays(*part))
    dataset, size = _map_style(part, contract.what)
    if isinstance(form, TokenForm) and form.longest is None:
        raise DataError(
            f"{contract.what} is read row by row, so the length of its texts is unknown: give `longest`, in tokens."
        )
    rows = list(range(min(SAMPLED, size)))
    sample, _ = contract.read(dataset, rows)
    again, _ = contract.read(dataset, rows)
    contract = replace(contract, shape=tuple(sample.shape[1:]), dtype=sample.dtype)
    fits = sample[0].nbytes * size <= options.memory_gib * 2**30
    if options.in_memory == "no" or (options.in_memory == "auto" and not (fits and torch.equal(sample, again))):
        return Streamed(dataset, options.workers, contract, classes.known_labels(dataset, contract))
    images, labels = torch.empty((size, *sample.shape[1:]), dtype=sample.dtype), torch.empty(size, dtype=torch.int64)
    for rows in torch.arange(size).split(READ_AT_ONCE):
        images[rows], labels[rows] = contract.read(dataset, rows.tolist())
    return InMemory(images, labels)


def _filled(split: Split | None, form: TokenForm) -> Split | None:
    return replace(split, images=form.filled(split.images)) if isinstance(split, InMemory) else split


def _map_style(part: Any, what: str) -> tuple[Any, int]:
    """Returns the data set, which can be read by row, and its length."""
    if isinstance(part, DataLoader):
        plain = isinstance(part.sampler, SequentialSampler | RandomSampler) and part.collate_fn is default_collate
        if not plain:
            raise DataError(
                f"{what} is a DataLoader with a sampler or collate_fn of its own; give its data set instead."
            )
        part = part.dataset
    if isinstance(part, IterableDataset):
        raise DataError(f"{what} cannot be read by row: it is an IterableDataset. Give a map-style data set.")
    try:
        size = len(part)
    except Exception as error:
        raise DataError(
            f"{what} cannot be read: {type(error).__name__}: {error}. Give (images, labels), or a data set with __len__ and __getitem__."
        ) from error
    if size == 0:
        raise DataError(f"{what} is empty.")
    return part, size


def _expecting(split: Split, number: int) -> Split:
    if isinstance(split, InMemory) or split.new_labels is not None:
        return split
    return replace(split, contract=replace(split.contract, classes=number))


def _set_aside(train: Split, options: DataOptions, groups: Sequence[Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that stay in the train split, and those set aside for validation."""
    if not 0 < options.validation < 1:
        raise DataError(f"--validation is the share set aside, between 0 and 1; got {options.validation}.")
    if groups is None and not options.stratify:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.split_seed))
        size = max(1, round(len(train) * options.validation))
        return order[size:], order[:size]
    if train.labels is None:
        raise DataError(
            f"The labels of {options.dataset!r} are unknown before its images are read, so it cannot be divided by class. Give the data set an "
            "attribute `targets` with all labels, or --in-memory yes."
        )
    labels = train.labels.cpu().numpy()
    if groups is None:
        stay, aside = splitting.stratified(labels, options.validation, options.split_seed)
    else:
        stay, aside = splitting.by_group(labels, groups, options.validation, options.split_seed)
    return torch.from_numpy(stay), torch.from_numpy(aside)


def _measure(train: Split, spec: InputSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    rows = in_order(train)[: 2000 if isinstance(train, Streamed) else None]
    total = squares = torch.zeros(())
    count = 0
    for images, _ in train.batches(rows, 512):
        wide = images.double().transpose(0, 1).flatten(1)  # (channels or features, numbers of all rows)
        known = ~wide.isnan()
        wide = wide.nan_to_num(0)
        total = total + wide.sum(dim=1)
        squares = squares + wide.square().sum(dim=1)
        count = count + known.sum(dim=1).clamp_min(0)
    count = torch.as_tensor(count).clamp_min(1)
    mean, squares = total / count, squares / count
    if spec.fields:
        mean, squares = named.pooled(spec.fields, mean, squares)
    std = (squares - mean.square()).clamp_min(0).sqrt()
    if spec.kind == "image":
        std = torch.where(std < 1e-6, torch.ones_like(std), std)  # a constant channel is left as it is
        return tuple(round(float(m), 6) for m in mean), tuple(round(float(s), 6) for s in std)
    # Features may have any scale.
    constant = std <= 1e-6 * mean.abs().clamp_min(torch.finfo(torch.float32).tiny)
    std = torch.where(constant, torch.ones_like(std), std)
    return tuple(float(f"{m:.7g}") for m in mean.tolist()), tuple(float(f"{s:.7g}") for s in std.tolist())


def _augment(options: DataOptions, own: Augment, spec: InputSpec) -> Augment:
    choice = options.augment
    if choice == "auto" or (choice == "none" and spec.kind != "image"):
        return own if choice == "auto" else Augment()
    if spec.kind != "image":
        raise DataError(f"--augment {choice} is for images; {options.dataset!r} has {spec.kind}.")
    return Augment(crop=max(1, spec.shape[1] // 8) if "crop" in choice else 0, flip="flip" in choice)


def _fingerprint(splits: Sequence[Split], tokenizer: bytes | None, weights: Sequence[float] | None) -> str:
    digest = hashlib.sha256(tokenizer or b"")
    if weights is not None:
        digest.update(np.asarray(weights, np.float64).tobytes())
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
