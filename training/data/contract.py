"""The requirements on a split, whether given as tensors, NumPy arrays or items of a map-style data set.

The first input of a split determines shape and type of all others. Data in memory is checked once and completely,
streamed data batch by batch, by the same code. forms.py says what inputs must be; labels become int64 from integers of
any width, one-hot rows and names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.forms import IMAGES, Form
from training.errors import DataError

Batch = tuple[torch.Tensor, torch.Tensor]
ITEM = "give pairs (image, label), or dicts with the keys 'image' and 'label'"


@dataclass(frozen=True)
class Contract:
    """The contract of one split, and how its errors name it."""

    what: str  # "The train split of 'digits'"
    names: Sequence[str] | None = None  # class names, if the source has them; labels may then be names
    classes: int | None = None  # number of classes, once it is known; labels are 0 … classes − 1
    shape: tuple[int, ...] | None = None  # (C, H, W) of the first image
    dtype: torch.dtype | None = None  # of the first image: uint8 or float32
    form: Form = IMAGES  # of the inputs

    def arrays(self, images: Any, labels: Any) -> Batch:
        """Check and convert a whole split that is given as two tensors or arrays.

        Args:
            images: (N, *shape), as the form says.
            labels: (N,) integers, or floating point or strings that stand for them, or (N, classes) one-hot.

        Returns:
            Inputs as the form gives them, and labels int64.

        Raises:
            DataError: they violate the contract.
        """
        images, labels = self.form.whole(images, self.what), self.labels(labels)
        if len(images) != len(labels):
            raise DataError(
                f"{self.what} has {len(images)} images and {len(labels)} labels; each image needs one label. "
                "Were both cut or filtered in the same way?"
            )
        if len(images) == 0:
            raise DataError(f"{self.what} is empty.")
        return self.form.checked(images, range(len(images)), self.what), labels

    def read(self, dataset: Any, rows: Sequence[int]) -> Batch:
        """Read, check and convert rows of a map-style data set.

        Returns:
            Inputs (batch, *shape), and labels (batch,), int64.

        Raises:
            DataError: a row cannot be read, or violates the contract; the message names it.
        """
        pairs = [self._pair(item, row) for item, row in zip(self._items(dataset, rows), rows, strict=True)]
        shape = self.shape or tuple(pairs[0][0].shape)
        dtype = self.dtype or pairs[0][0].dtype
        for (image, _), row in zip(pairs, rows, strict=True):
            if tuple(image.shape) != shape:
                raise DataError(
                    f"{self._at(row)} is an image of shape {tuple(image.shape)}, others have {shape}; images of one data set must "
                    "have one shape. Resize them in the data set."
                )
            if image.dtype != dtype:
                raise DataError(
                    f"{self._at(row)} is an image of {image.dtype}, others are {dtype}; give all of them as uint8 (0 … 255) or all "
                    "as float32 (in [0, 1])."
                )
        images = torch.stack([image for image, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
        images = self.form.checked(images, rows, self.what)
        if self.classes is not None:
            for label, row in zip(labels.tolist(), rows, strict=True):
                if not 0 <= label < self.classes:
                    raise DataError(
                        f"{self._at(row)} has the label {label}; with {self.classes} classes labels are 0 … {self.classes - 1}. "
                        f"{why_out_of_range(label, label, self.classes)}"
                    )
        return images, labels

    def labels(self, labels: Any) -> torch.Tensor:
        """All labels of a split as int64 (N,).

        Raises:
            DataError: they are not one integer for each image.
        """
        try:
            if isinstance(labels, torch.Tensor):
                labels = labels.detach().cpu()
                labels = labels.double() if labels.is_floating_point() else labels
            array: NDArray[Any] = np.asarray(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.what} must give labels as integers (N,); reading them failed: {error}") from None
        if array.dtype.kind in "UO" and array.ndim == 1:
            array = np.array([self._label(value, row) for row, value in enumerate(array.tolist())], np.int64)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.dtype.kind not in "biuf" or array.ndim not in (1, 2):
            raise DataError(f"{self.what} must give labels as integers (N,); it gives {array.dtype} {array.shape}.")
        if array.ndim == 2:
            self._check_width(array.shape[1])
            bad = np.flatnonzero(~(((array == 0) | (array == 1)).all(axis=1) & (array.sum(axis=1) == 1)))
            if len(bad):
                raise DataError(
                    f"{self.what} must give labels as integers (N,); it gives {array.shape}, and row {bad[0]} is not one-hot. Several "
                    "labels for one image, or class probabilities, are not supported."
                )
            array = array.argmax(axis=1)
        elif array.dtype.kind == "f":
            bad = np.flatnonzero(~(np.abs(array) < 2**53) | (array != np.floor(array)))  # NaN is neither
            if len(bad):
                raise DataError(f"{self.what} must give labels as integers; row {bad[0]} has {array[bad[0]]}.")
        return torch.from_numpy(np.require(array, np.int64, ["C", "W"]))

    def _at(self, row: int) -> str:
        return f"{self.what}, row {row},"

    def _items(self, dataset: Any, rows: Sequence[int]) -> list[Any]:
        row = rows[0]
        try:
            if callable(many := getattr(dataset, "__getitems__", None)):
                try:
                    items = list(cast("Any", many(list(rows))))
                except Exception:  # read one by one instead, to identify the failing row
                    items = []
                if len(items) == len(rows):
                    return items
            items = []
            for row in rows:
                items.append(dataset[row])
            return items
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.what} cannot be read: row {row} raises {type(error).__name__}: {error}. Is a file damaged or missing? "
                f"dataset[{row}] in Python shows where it fails."
            ) from error

    def _pair(self, item: Any, row: int) -> tuple[torch.Tensor, int]:
        if isinstance(item, dict) and "label" in item and (key := "image" if "image" in item else "img") in item:
            item = (item[key], item["label"])
        if not isinstance(item, tuple | list):
            keys = f" with the keys {', '.join(map(repr, item))}" if isinstance(item, dict) else ""
            raise DataError(f"{self.what} must {ITEM}; row {row} is {type(item).__name__}{keys}.")
        if len(item) < 2:
            raise DataError(f"{self.what} must {ITEM}; row {row} has {len(item)} value.")
        return self.form.one(item[0], self._at(row)), self._label(item[1], row)

    def _label(self, value: Any, row: int) -> int:
        number: Any = value
        if isinstance(value, torch.Tensor | np.ndarray | list | tuple):
            array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value).reshape(-1)
            one_hot = len(array) > 1 and array.dtype.kind in "biuf" and bool(((array == 0) | (array == 1)).all())
            if one_hot and array.sum() == 1:
                self._check_width(len(array))
                return int(array.argmax())
            number = array.tolist()[0] if len(array) == 1 else value
        if isinstance(number, str):
            if self.names is None or number not in self.names:
                raise DataError(
                    f"{self._at(row)} has the label {number!r}. Labels are integers, or names of `classes`, "
                    + ("which the data set does not give." if self.names is None else "where it is missing.")
                )
            return self.names.index(number)
        try:
            if int(number) == number and abs(number) < 2**53:
                return int(number)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass
        raise DataError(f"{self.what} must give labels as integers; row {row} has {value!r}.")

    def _check_width(self, width: int) -> None:
        if self.names is not None and width != len(self.names):
            raise DataError(f"{self.what} has one-hot labels of {width} classes, but {len(self.names)} class names.")


def why_out_of_range(low: int, high: int, classes: int) -> str:
    """The likely cause of labels low … high where only 0 … classes − 1 are valid."""
    if low < 0:
        return "A negative label often marks images without a label: leave them out."
    if high == classes:
        return "Labels seem to begin at 1: subtract 1."
    return "Labels count the classes from 0, in the order of `classes`."
