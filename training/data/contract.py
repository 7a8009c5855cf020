"""The requirements on images and labels, whether given as tensors, NumPy arrays or items of a map-style data set.

The first image of a split determines shape and kind (uint8 or floating point) of all others. Data in memory is checked
once and completely, streamed data batch by batch, by the same code. Unambiguous forms are
converted: float64 to float32, integers of any width to int64, one-hot labels to integers, PIL images to uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from training.errors import DataError

Batch = tuple[torch.Tensor, torch.Tensor]
ROUNDING = 1e-6  # pixels so little outside [0, 1] are clamped
ITEM = "give pairs (image, label), or dicts with the keys 'image' and 'label'"


@dataclass(frozen=True)
class Contract:
    """The contract of one split, and how its errors name it."""

    what: str  # "The train split of 'digits'"
    names: Sequence[str] | None = None  # class names, if the source has them; labels may then be names
    classes: int | None = None  # number of classes, once it is known; labels are 0 … classes − 1
    shape: tuple[int, ...] | None = None  # (C, H, W) of the first image
    dtype: torch.dtype | None = None  # of the first image: uint8 or float32

    def arrays(self, images: Any, labels: Any) -> Batch:
        """Check and convert a whole split that is given as two tensors or arrays.

        Args:
            images: (N, C, H, W), uint8, or floating point in [0, 1].
            labels: (N,) integers, or floating point or strings that stand for them, or (N, classes) one-hot.

        Returns:
            Images uint8 or float32, and labels int64.

        Raises:
            DataError: they violate the contract.
        """
        images = self._floats_or_bytes(_tensor(images, f"{self.what}: images"), f"{self.what}: images")
        if images.ndim == 3:
            raise DataError(
                f"{self.what} has images of shape {tuple(images.shape)}; it must be (N, C, H, W). "
                "If they are grey, (N, H, W), add the channel axis: images[:, None]."
            )
        if images.ndim != 4:
            raise DataError(f"{self.what} has images of shape {tuple(images.shape)}; it must be (N, C, H, W).")
        labels = self.labels(labels)
        if len(images) != len(labels):
            raise DataError(
                f"{self.what} has {len(images)} images and {len(labels)} labels; each image needs one label. "
                "Were both cut or filtered in the same way?"
            )
        if len(images) == 0:
            raise DataError(f"{self.what} is empty.")
        _check_shape(tuple(images.shape[1:]), self.what)
        return self._in_range(images, range(len(images))), labels

    def read(self, dataset: Any, rows: Sequence[int]) -> Batch:
        """Read, check and convert rows of a map-style data set.

        Returns:
            Images (batch, C, H, W), uint8 or float32, and labels (batch,), int64.

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
        images = self._in_range(images, rows)
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
        if len(item) != 2:
            raise DataError(f"{self.what} must {ITEM}; row {row} has {len(item)} values. Leave the others out.")
        return self._image(item[0], self._at(row)), self._label(item[1], row)

    def _image(self, value: Any, where: str) -> torch.Tensor:
        if isinstance(value, Image.Image):
            if value.mode not in ("L", "RGB"):
                raise DataError(
                    f"{where} is a PIL image of mode {value.mode}; only L (grey) and RGB are unambiguous. Use .convert('RGB')."
                )
            pixels = np.array(value)
            value = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise DataError(f"{where} must be an image as float32 (C, H, W); it is {type(value).__name__}.")
        image = self._floats_or_bytes(_tensor(value, where), where)
        if image.ndim != 3:
            grey = " If it is grey, (H, W), add the channel axis: image[None]." if image.ndim == 2 else ""
            raise DataError(f"{where} is an image of shape {tuple(image.shape)}; it must be (C, H, W).{grey}")
        _check_shape(tuple(image.shape), where)
        return image

    def _floats_or_bytes(self, images: torch.Tensor, where: str) -> torch.Tensor:
        if images.is_floating_point():
            return images.float()
        if images.dtype != torch.uint8:
            raise DataError(
                f"{where} of {images.dtype}: give uint8 for values 0 … 255, or float32 for values in [0, 1]; other integers "
                "have no defined value for white."
            )
        return images

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

    def _in_range(self, images: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        if images.dtype == torch.uint8:
            return images
        low, high = (float(value) for value in images.aminmax())
        if low >= 0 and high <= 1:  # false for NaN
            return images
        if low >= -ROUNDING and high <= 1 + ROUNDING:
            return images.clamp(0, 1)
        flat = images.flatten(1)
        bad = int((~((flat.amin(1) >= 0) & (flat.amax(1) <= 1))).int().argmax())
        row = rows[bad]
        if np.isnan(low) or np.isinf(low) or np.isinf(high):
            low, high = (float(value) for value in images[bad].aminmax())
            if not np.isfinite([low, high]).all():
                raise DataError(
                    f"{self._at(row)} has {'NaN' if np.isnan(low) else 'infinite'} pixels; values must lie in [0, 1]. A division by zero or a "
                    "damaged file makes such values: repair the image or leave it out."
                )
        raise DataError(
            f"{self.what} has values from {low:.6g} to {high:.6g}, first in row {row}; they must lie in [0, 1]. {_why_outside(low, high)}"
        )


def why_out_of_range(low: int, high: int, classes: int) -> str:
    """The likely cause of labels low … high where only 0 … classes − 1 are valid."""
    if low < 0:
        return "A negative label often marks images without a label: leave them out."
    if high == classes:
        return "Labels seem to begin at 1: subtract 1."
    return "Labels count the classes from 0, in the order of `classes`."


def _why_outside(low: float, high: float) -> str:
    if low >= -0.25 and high <= 1.25:
        return "A little outside, as after bicubic resizing or rounding: clamp them to [0, 1]."
    if low < 0:
        return "If they are already normalised, remove that step: the exported graph normalises (--mean, --std)."
    if high <= 255:
        return "If they are 0 … 255, divide by 255, or give them as uint8."
    return "Divide by the largest value that a pixel can have."


def _tensor(value: Any, where: str) -> torch.Tensor:
    """A plain strided tensor on the CPU, without copying where that is possible."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().as_subclass(torch.Tensor)
            return value if value.layout == torch.strided else value.to_dense()
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"an array of {array.dtype}. Do the images have different sizes?")
        # torch supports neither foreign byte orders nor read-only memory.
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} cannot become a tensor: {error}") from None


def _check_shape(shape: tuple[int, ...], where: str) -> None:
    if 0 in shape:
        raise DataError(f"{where} has images without pixels, of shape {shape}; it must be (C, H, W).")
    channels, height, width = shape
    # The first two axes are longer than a usual number of channels, and the last one is a usual number of channels. If
    # the second axis is short too, as in features (512, 4, 4), both layouts are possible.
    if channels > 4 and height > 4 and width in (1, 3, 4):
        raise DataError(
            f"{where} has images of shape {shape}, which looks like (H, W, C); permute to (C, H, W): image.permute(2, 0, 1), for a "
            f"batch images.permute(0, 3, 1, 2). If there really are {channels} channels, swap H and W."
        )
