"""What the inputs of a split must be, for each kind: images, features and tokens. contract.py reads rows and labels.

Each form converts what has one meaning, and refuses what has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image

from models_store.inputs import kinds
from models_store.inputs.texts import Tokenizer
from models_store.manifest import PADDING, InputSpec, TableField
from training.errors import DataError

ROUNDING = 1e-6  # pixels so little outside [0, 1] are clamped
Resize = Literal["refuse", "stretch", "crop"]
Missing = Literal["refuse", "mean"]


class Form(Protocol):
    """The form of the inputs of one split."""

    def whole(self, inputs: Any, what: str) -> torch.Tensor:
        """All inputs of a split as a tensor (N, *shape).

        Raises:
            DataError: they cannot be such a tensor.
        """
        ...

    def one(self, value: Any, where: str) -> torch.Tensor:
        """The input of one row, (*shape).

        Raises:
            DataError: it cannot be such a tensor.
        """
        ...

    def checked(self, inputs: torch.Tensor, rows: Sequence[int], what: str) -> torch.Tensor:
        """Inputs of these rows, if their values are allowed.

        Raises:
            DataError: a value is not allowed; the message names the row.
        """
        ...

    def spec(self, shape: Sequence[int]) -> InputSpec:
        """What an ensemble takes that is trained on rows of this shape."""
        ...


@dataclass(frozen=True)
class ImageForm:
    """Images (C, H, W): uint8, or floats in [0, 1]; PIL images and all that has this one meaning."""

    resize: Resize = "refuse"

    def whole(self, inputs: Any, what: str) -> torch.Tensor:
        """See Form. uint8 or float32 (N, C, H, W)."""
        images = _floats_or_bytes(tensor(inputs, f"{what}: images"), f"{what}: images")
        if images.ndim == 3:
            raise DataError(
                f"{what} has images of shape {tuple(images.shape)}; it must be (N, C, H, W). If they are grey, (N, H, W), add the channel "
                "axis: images[:, None]. If they are no images but signals, say so: kind='features'."
            )
        if images.ndim != 4:
            raise DataError(f"{what} has images of shape {tuple(images.shape)}; it must be (N, C, H, W).")
        if len(images):
            _check_shape(tuple(images.shape[1:]), what)
        return images

    def one(self, value: Any, where: str) -> torch.Tensor:
        """See Form. uint8 or float32 (C, H, W)."""
        if isinstance(value, Image.Image):
            if value.mode not in ("L", "RGB"):
                raise DataError(
                    f"{where} is a PIL image of mode {value.mode}; only L (grey) and RGB are unambiguous. Use .convert('RGB')."
                )
            pixels = np.array(value)
            value = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise DataError(f"{where} must be an image as float32 (C, H, W); it is {type(value).__name__}.")
        image = _floats_or_bytes(tensor(value, where), where)
        if image.ndim != 3:
            grey = " If it is grey, (H, W), add the channel axis: image[None]." if image.ndim == 2 else ""
            raise DataError(f"{where} is an image of shape {tuple(image.shape)}; it must be (C, H, W).{grey}")
        _check_shape(tuple(image.shape), where)
        return image

    def checked(self, inputs: torch.Tensor, rows: Sequence[int], what: str) -> torch.Tensor:
        """See Form. Pixels that rounding has moved a little outside [0, 1] are clamped."""
        if inputs.dtype == torch.uint8:
            return inputs
        low, high = (float(value) for value in inputs.aminmax())
        if low >= 0 and high <= 1:  # false for NaN
            return inputs
        if low >= -ROUNDING and high <= 1 + ROUNDING:
            return inputs.clamp(0, 1)
        flat = inputs.flatten(1)
        bad = int((~((flat.amin(1) >= 0) & (flat.amax(1) <= 1))).int().argmax())
        row = rows[bad]
        if np.isnan(low) or np.isinf(low) or np.isinf(high):
            low, high = (float(value) for value in inputs[bad].aminmax())
            if not np.isfinite([low, high]).all():
                raise DataError(
                    f"{what}, row {row}, has {'NaN' if np.isnan(low) else 'infinite'} pixels; values must lie in [0, 1]. A division by zero or a "
                    "damaged file makes such values: repair the image or leave it out."
                )
        raise DataError(
            f"{what} has values from {low:.6g} to {high:.6g}, first in row {row}; they must lie in [0, 1]. {_why_outside(low, high)}"
        )

    def spec(self, shape: Sequence[int]) -> InputSpec:
        """See Form."""
        return InputSpec(shape=tuple(shape), resize=self.resize)


IMAGES = ImageForm()  # the usual form


@dataclass(frozen=True)
class FeatureForm:
    """Numbers of any meaning, (*shape): the row of a table, a window of a signal, an embedding."""

    low: float | None = None  # smallest and largest allowed value
    high: float | None = None
    missing: Missing = "refuse"  # whether NaN is refused, or replaced by the feature's mean in the graph
    fields: tuple[TableField, ...] | None = None

    def whole(self, inputs: Any, what: str) -> torch.Tensor:
        """See Form. float32 (N, *shape)."""
        features = tensor(inputs, f"{what}: features")
        if features.ndim < 2 or 0 in features.shape[1:]:
            raise DataError(
                f"{what} has features of shape {tuple(features.shape)}; it must be (N, …), with a number at least."
            )
        return _as_float32(features, what)

    def one(self, value: Any, where: str) -> torch.Tensor:
        """See Form. float32 (*shape)."""
        features = tensor(value, where)
        if features.ndim < 1 or 0 in features.shape:
            raise DataError(f"{where} has features of shape {tuple(features.shape)}; it must have one axis at least.")
        return _as_float32(features, where)

    def checked(self, inputs: torch.Tensor, rows: Sequence[int], what: str) -> torch.Tensor:
        """See Form."""
        array = inputs.numpy()
        spec = self.spec(array.shape[1:])
        if kinds.fault(spec, array) is None:
            return inputs
        for row, values in zip(rows, array, strict=True):
            if (fault := kinds.fault(spec, values[None])) is not None:
                advice = " Where numbers are missing, --missing mean replaces them." if np.isnan(values).any() else ""
                raise DataError(f"{what}, row {row}, {fault}.{advice}")
        raise AssertionError("one of the rows is at fault")

    def spec(self, shape: Sequence[int]) -> InputSpec:
        """See Form."""
        fields = list(self.fields) if self.fields else None
        return InputSpec(
            kind="features", shape=tuple(shape), low=self.low, high=self.high, missing=self.missing, fields=fields
        )


@dataclass(frozen=True)
class TokenForm:
    """Texts as ids of a vocabulary, (length,): 0 fills them up to the longest one."""

    vocabulary: int
    longest: int | None = None  # tokens; None: as in the train split
    tokenizer: bytes | None = None  # content of a tokenizer.json; then texts may be strings

    def whole(self, inputs: Any, what: str) -> torch.Tensor:
        """See Form. int64 (N, longest)."""
        if (
            self.tokenizer
            and isinstance(inputs, list | tuple | np.ndarray)
            and len(inputs)
            and isinstance(inputs[0], str)
        ):
            inputs = [np.array(ids, np.int64) for ids in _tokenizer(self.tokenizer).ids([str(text) for text in inputs])]
        if isinstance(inputs, list | tuple):
            found = [self._ids(text, f"{what}, row {row},") for row, text in enumerate(inputs)]
            inputs = self._filled(found, max(map(len, found), default=0))
        ids = tensor(inputs, f"{what}: token ids")
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise DataError(f"{what} has token ids of {ids.dtype} {tuple(ids.shape)}; it must be integers (N, length).")
        return self._fitted(ids.long(), what)

    def one(self, value: Any, where: str) -> torch.Tensor:
        """See Form. int64 (longest,)."""
        if self.tokenizer and isinstance(value, str):
            value = np.array(_tokenizer(self.tokenizer).ids([value])[0], np.int64)
        ids = self._ids(value, where)
        return self._fitted(ids[None], where)[0] if self.longest else ids

    def checked(self, inputs: torch.Tensor, rows: Sequence[int], what: str) -> torch.Tensor:
        """See Form."""
        array = inputs.numpy()
        spec = self.spec(array.shape[1:])
        for row, values in zip(rows, array, strict=True) if kinds.fault(spec, array) is not None else ():
            if (fault := kinds.fault(spec, values[None])) is not None:
                raise DataError(f"{what}, row {row}, {fault}.")
        return inputs

    def spec(self, shape: Sequence[int]) -> InputSpec:
        """See Form."""
        return InputSpec(
            kind="tokens",
            shape=tuple(shape),
            vocabulary=self.vocabulary,
            open_length=True,
            tokenizer=self.tokenizer is not None,
        )

    def filled(self, ids: torch.Tensor) -> torch.Tensor:
        """Texts (N, length) filled up to this form's length."""
        return self._filled(list(ids), self.longest or ids.shape[1])

    def of_length(self, longest: int) -> Self:
        """The same form with this length."""
        return replace(self, longest=longest)

    def _ids(self, value: Any, where: str) -> torch.Tensor:
        ids = tensor(value, where)
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise DataError(f"{where} has token ids of {ids.dtype} {tuple(ids.shape)}; a text is integers (length,).")
        return ids.long()

    def _filled(self, texts: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
        found = torch.full((len(texts), longest), PADDING)
        for row, text in zip(found, texts, strict=True):
            row[: len(text)] = text
        return found

    def _fitted(self, ids: torch.Tensor, what: str) -> torch.Tensor:
        if self.longest is None:
            return ids
        if ids.shape[1] > self.longest and bool((ids[:, self.longest :] != PADDING).any()):
            raise DataError(
                f"{what} has a text of more than {self.longest} tokens, the longest of the train split. Cut it, or give `longest`."
            )
        return self._filled(list(ids[:, : self.longest]), self.longest)


@cache
def _tokenizer(content: bytes) -> Tokenizer:
    return Tokenizer(content)


def tensor(value: Any, where: str) -> torch.Tensor:
    """A plain strided tensor on the CPU, without copying where that is possible.

    Raises:
        DataError: the value is not an array of numbers.
    """
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().as_subclass(torch.Tensor)
            return value if value.layout == torch.strided else value.to_dense()
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"an array of {array.dtype}. Do the inputs have different sizes?")
        # torch supports neither foreign byte orders nor read-only memory.
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} cannot become a tensor: {error}") from None


def _as_float32(features: torch.Tensor, where: str) -> torch.Tensor:
    if features.is_complex():
        raise DataError(f"{where} has complex numbers; give real and imaginary parts as two features.")
    return features.float()


def _floats_or_bytes(images: torch.Tensor, where: str) -> torch.Tensor:
    if images.is_floating_point():
        return images.float()
    if images.dtype != torch.uint8:
        raise DataError(
            f"{where} of {images.dtype}: give uint8 for values 0 … 255, or float32 for values in [0, 1]; other integers "
            "have no defined value for white."
        )
    return images


def _why_outside(low: float, high: float) -> str:
    if low >= -0.25 and high <= 1.25:
        return "A little outside, as after bicubic resizing or rounding: clamp them to [0, 1]."
    if low < 0:
        return "If they are already normalised, remove that step: the exported graph normalises (--mean, --std)."
    if high <= 255:
        return "If they are 0 … 255, divide by 255, or give them as uint8."
    return "Divide by the largest value that a pixel can have."


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
