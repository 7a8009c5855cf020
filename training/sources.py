"""Where data sets come from: the built-in ones, folders of images, and what a user's factory returns."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from models_store import decoding
from models_store.errors import DecodeError
from models_store.manifest import InputSpec
from training.augment import Augment
from training.errors import DataError

# Tensors (images, labels), or a map-style dataset, or None for a split that the source does not have.
Part = tuple[torch.Tensor, torch.Tensor] | Any | None
Resize = Literal["refuse", "stretch", "crop"]

NO_AUGMENT = Augment()
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Source:
    """Splits and what the source says of them."""

    parts: tuple[Part, Part, Part]  # train, validation, test
    classes: Sequence[str] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment = NO_AUGMENT
    resize: Resize = "refuse"


def data_root() -> Path:
    """$MODEPATH_DATA, or ./data: where torchvision's folders are looked for. Nothing is downloaded."""
    return Path(os.environ.get("MODEPATH_DATA") or "data")


def digits() -> Source:
    """scikit-learn's digits. A flipped digit is another sign, so there are no flips. One fifth is the test split."""
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
        resize="stretch",
    )


def fashion_mnist() -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60 000 + 10 000 images of 28×28."""
    for folder in (data_root() / "FashionMNIST" / "raw", DEBIAN_FASHION):
        if any(folder.glob("train-images-idx3-ubyte*")):
            train, test = (_idx_pair(folder, prefix) for prefix in ("train", "t10k"))
            return Source(
                parts=(train, None, test), classes=FASHION_CLASSES, augment=Augment(crop=2, flip=True), resize="stretch"
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
            "Nothing is downloaded by itself."
        ) from None
    parts = [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return Source((parts[0], None, parts[1]), train.classes, augment=Augment(crop=4, flip=True), resize="stretch")


BUILT_IN: dict[str, Callable[[], Source]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": lambda: _cifar(10),
    "cifar100": lambda: _cifar(100),
}


def image_folder(path: str, size: int) -> Source:
    """Folders of images, one a class. PATH/train with PATH/val and PATH/test; a missing `test` is served by `val`
    (validation then comes off the train split); without PATH/train the classes lie in PATH, and a fifth is the test split.
    """
    from torchvision import datasets

    root = Path(path)
    if not root.is_dir():
        raise DataError(f"imagefolder:{path} is not a folder.")
    spec = InputSpec(shape=(3, size, size), resize="crop")

    def read(folder: Path) -> Any:
        try:
            return datasets.ImageFolder(str(folder), loader=partial(_decoded, spec=spec))
        except (FileNotFoundError, OSError) as error:
            raise DataError(f"imagefolder:{path}: {error}") from None

    if not (root / "train").is_dir():
        whole = read(root)
        order = np.random.default_rng(0).permutation(len(whole)).tolist()
        held_out = len(order) // 5
        test = torch.utils.data.Subset(whole, order[:held_out])
        train = torch.utils.data.Subset(whole, order[held_out:])
        return Source((train, None, test), whole.classes, augment=Augment(crop=size // 8, flip=True), resize="crop")
    parts = {name: read(root / name) for name in ("train", "val", "test") if (root / name).is_dir()}
    classes = {name: part.classes for name, part in parts.items()}
    if any(named != classes["train"] for named in classes.values()):
        raise DataError(f"imagefolder:{path}: the splits have different class folders: {classes}.")
    if len(parts) == 1:
        raise DataError(f"imagefolder:{path} has train/ but neither test/ nor val/: nothing to report on.")
    validation, test = (parts.get("val"), parts["test"]) if "test" in parts else (None, parts["val"])
    return Source(
        (parts["train"], validation, test), classes["train"], augment=Augment(crop=size // 8, flip=True), resize="crop"
    )


def _decoded(path: str, spec: InputSpec) -> torch.Tensor:
    # By the code that the service decodes with: a network sees in training what it will see in serving.
    try:
        return torch.from_numpy(decoding.to_array(decoding.open_image(Path(path).read_bytes()), spec))
    except DecodeError as error:
        raise DataError(f"{path}: {error}") from None


def from_user(name: str, made: Any) -> Source:
    """What a user's factory returned: (train, validation, test), perhaps with classes, mean, std, augment, resize."""
    try:
        parts = (made.train, made.validation, made.test) if hasattr(made, "train") else tuple(made)
        train, validation, test = parts
    except (TypeError, ValueError, AttributeError):
        raise DataError(
            f"Data factory {name!r} must return (train, validation, test), or an object with those attributes; "
            f"it returned {type(made).__name__}."
        ) from None
    resize = getattr(made, "resize", "refuse")
    if resize not in ("refuse", "stretch", "crop"):
        raise DataError(f"Data factory {name!r}: resize is refuse, stretch or crop; got {resize!r}.")
    augment = getattr(made, "augment", None) or Augment()
    if not callable(augment):
        raise DataError(f"Data factory {name!r}: augment must be callable as augment(images, generator).")
    mean, std = getattr(made, "mean", None), getattr(made, "std", None)
    return Source(
        parts=(train, validation, test),
        classes=list(map(str, made.classes)) if getattr(made, "classes", None) else None,
        mean=tuple(map(float, mean)) if mean is not None else None,
        std=tuple(map(float, std)) if std is not None else None,
        augment=augment,  # pyright: ignore[reportArgumentType]
        resize=resize,
    )


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
        raise DataError(f"{folder / name} is not a whole idx file ({error}); fetch it again.") from None
