"""Sources of data sets: the built-in ones, and those of users' factories. For folders of images see image_folder.py."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from training.data.augment import Augment
from training.data.forms import IMAGES, FeatureForm, Form, ImageForm, TokenForm, named, texts
from training.errors import DataError

# Tensors (images, labels), or a map-style dataset, or None for a split that the source does not have.
Part = tuple[torch.Tensor, torch.Tensor] | Any | None

NO_AUGMENT = Augment()
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Source:
    """The splits of a data set, and their description."""

    parts: tuple[Part, Part, Part]  # train, validation, test
    classes: Sequence[str] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment = NO_AUGMENT
    form: Form = IMAGES  # of the inputs, in all splits
    notes: tuple[str, ...] = ()  # for the log: parts of the source that are not used
    groups: Sequence[Any] | None = None  # of each training row: rows with equal values are not divided
    weights: Sequence[float] | None = None  # of each training row: how often it is drawn, with --draw weights


def data_root() -> Path:
    """The folder of torchvision's data sets: $MODEPATH_DATA, or ./data. Nothing is downloaded."""
    return Path(os.environ.get("MODEPATH_DATA") or "data")


def digits() -> Source:
    """scikit-learn's digits. No flips, because a flipped digit is another sign. One fifth is the test split."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32) / 16)[:, None]  # (1797, 1, 8, 8)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    test, train = order[:360], order[360:]
    return Source(
        parts=((images[train], labels[train]), None, (images[test], labels[test])),
        classes=[str(digit) for digit in range(10)],
        augment=Augment(crop=1),
        form=ImageForm("stretch"),
    )


def fashion_mnist() -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60 000 + 10 000 images of 28×28."""
    for folder in (data_root() / "FashionMNIST" / "raw", DEBIAN_FASHION):
        if any(folder.glob("train-images-idx3-ubyte*")):
            train, test = (_idx_pair(folder, prefix) for prefix in ("train", "t10k"))
            return Source(
                parts=(train, None, test),
                classes=FASHION_CLASSES,
                augment=Augment(crop=2, flip=True),
                form=ImageForm("stretch"),
            )
    raise DataError(
        f"Fashion-MNIST is neither in {data_root() / 'FashionMNIST'} (torchvision's folder; $MODEPATH_DATA) nor in {DEBIAN_FASHION} "
        "(Debian: apt install dataset-fashion-mnist)."
    )


def _cifar(classes: int) -> Source:
    from torchvision import datasets

    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    try:
        train, test = (kind(str(data_root()), train=is_train) for is_train in (True, False))
    except RuntimeError:
        raise DataError(
            f"CIFAR-{classes} is not in {data_root()} ($MODEPATH_DATA): put torchvision's folder {kind.base_folder} there. "
            "Nothing is downloaded automatically."
        ) from None
    parts = [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return Source(
        (parts[0], None, parts[1]), train.classes, augment=Augment(crop=4, flip=True), form=ImageForm("stretch")
    )


BUILT_IN: dict[str, Callable[[], Source]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": lambda: _cifar(10),
    "cifar100": lambda: _cifar(100),
}


def from_user(name: str, made: Any) -> Source:
    """Read what a user's factory returned: (train, validation, test), optionally with classes, mean, std and so on."""
    made = _named(made)
    try:
        parts = (made.train, made.validation, made.test) if hasattr(made, "train") else tuple(made)
        train, validation, test = parts
        train = named.packed(train)
        validation, test = (named.packed(part, train) for part in (validation, test))
    except (TypeError, ValueError, AttributeError):
        raise DataError(
            f"Data factory {name!r} must return (train, validation, test), or an object with those attributes; "
            f"it returned {type(made).__name__}."
        ) from None
    augment = getattr(made, "augment", None) or Augment()
    if not callable(augment):
        raise DataError(f"Data factory {name!r}: augment must be callable as augment(images, generator).")
    classes: Any = getattr(made, "classes", None)
    if isinstance(classes, str) or not (classes is None or isinstance(classes, Iterable)):
        raise DataError(f"Data factory {name!r}: classes must be a list of names, one for each label; got {classes!r}.")
    return Source(
        parts=(train, validation, test),
        classes=[str(one) for one in (() if classes is None else classes)] or None,
        mean=_channels(name, "mean", made),
        std=_channels(name, "std", made),
        augment=augment,  # pyright: ignore[reportArgumentType]
        form=_form(name, made, train),
        groups=_of_rows(name, "groups", made),
        weights=_weights(name, made),
    )


def _form(name: str, made: Any, train: Part) -> Form:
    """The form of the inputs, by `kind` or by the arrays where they have one meaning."""
    resize = getattr(made, "resize", "refuse")
    if resize not in ("refuse", "stretch", "crop"):
        raise DataError(f"Data factory {name!r}: resize must be refuse, stretch or crop; got {resize!r}.")
    if (tokenizer := getattr(made, "tokenizer", None)) is not None:
        return texts.form(tokenizer, getattr(made, "longest", None))
    kind, vocabulary = getattr(made, "kind", None), getattr(made, "vocabulary", None)
    if isinstance(train, named.Packed):
        kind = "features"
    if kind is None:
        inputs = train[0] if isinstance(train, tuple | list) and len(train) == 2 else None
        floats = isinstance(inputs, torch.Tensor | np.ndarray) and "float" in str(inputs.dtype) and inputs.ndim == 2
        kind = "tokens" if vocabulary is not None else "features" if floats else "image"
    if kind == "image":
        return ImageForm(resize)
    if kind == "features":
        low, high = getattr(made, "low", None), getattr(made, "high", None)
        fields = train.fields if isinstance(train, named.Packed) else None
        return FeatureForm(low, high, getattr(made, "missing", "refuse"), fields)
    if kind != "tokens" or not isinstance(vocabulary, int) or vocabulary < 2:
        raise DataError(
            f"Data factory {name!r}: kind must be image, features or tokens, and tokens need `vocabulary`, the number of ids; got {kind!r} and "
            f"{vocabulary!r}."
        )
    return TokenForm(vocabulary, getattr(made, "longest", None))


def _of_rows(name: str, what: str, made: Any) -> list[Any] | None:
    value = getattr(made, what, None)
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim != 1:
        raise DataError(
            f"Data factory {name!r}: {what} must be one value for each training row; got shape {array.shape}."
        )
    return array.tolist()


def _weights(name: str, made: Any) -> list[float] | None:
    found = _of_rows(name, "weights", made)
    if found is not None and not (
        all(isinstance(one, int | float) and 0 <= one < np.inf for one in found) and any(found)
    ):
        raise DataError(f"Data factory {name!r}: weights must be finite numbers of at least 0, and not all 0.")
    return found


def _named(made: Any) -> Any:
    if isinstance(made, dict) and {"train", "test"} <= made.keys():
        return SimpleNamespace(**{"validation": None, **made})
    return made


def _channels(name: str, what: str, made: Any) -> tuple[float, ...] | None:
    value = getattr(made, what, None)
    try:
        return None if value is None else tuple(map(float, value))
    except (TypeError, ValueError):
        raise DataError(
            f"Data factory {name!r}: {what} must be a list of numbers, one for each channel; got {value!r}."
        ) from None


def _idx_pair(folder: Path, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (_idx(folder, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64))


def _idx(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """An idx file, gzipped or not: two zero bytes, type, number of axes, their lengths big-endian, then the bytes."""
    try:
        plain = folder / name
        raw = plain.read_bytes() if plain.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
        axes = raw[3]
        shape = np.frombuffer(raw, ">i4", axes, 4)
        return np.frombuffer(raw, np.uint8, int(shape.prod()), 4 + 4 * axes).reshape(shape).copy()
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{folder / name} is not a complete idx file ({error}); download it again.") from None
