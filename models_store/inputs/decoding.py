"""Decode images to arrays, in the same way for training on a folder of images and for serving.

EXIF orientation is applied, alpha is composited on white, and 16-bit grey is scaled. Grey and RGB are converted to the
number of channels in the manifest's input shape. Images of another size are treated according to its `resize`.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from models_store.errors import DecodeError
from models_store.manifest import InputSpec

MODES = {1: "L", 3: "RGB"}
# A small file can cause hours of work: each scan of a progressive JPEG passes over the whole image, each EXIF segment
# is appended to those before it, and a PNG may decompress text without limit.
MAX_JPEG_SCANS = 64
MAX_EXIF_PIECES = 8
MAX_ASPECT = 20
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**18


def open_image(encoded: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Read the header only: `.size` is available, but no pixel is decoded.

    Args:
        encoded: the file's bytes.
        formats: allowed formats, by their names in Pillow (default: all that it supports).

    Raises:
        DecodeError: not an image of these formats.
    """
    if encoded.startswith(b"\xff\xd8") and (
        encoded.count(b"\xff\xda") > MAX_JPEG_SCANS or encoded.count(b"Exif\0\0") > MAX_EXIF_PIECES
    ):
        raise DecodeError("a JPEG with more scans or EXIF data than cameras and editors write. Save it again.")
    try:
        return Image.open(io.BytesIO(encoded), formats=formats)
    except Exception as error:  # for a broken header, each format's parser raises its own exceptions
        wanted = " or ".join(formats or ["image"])
        raise DecodeError(
            f"not a readable {wanted} file ({_said(error)}). Is it complete, and of that format?"
        ) from None


def to_array(image: Image.Image, spec: InputSpec) -> NDArray[np.float32]:
    """Decode to float32 (C, H, W) in [0, 1].

    Raises:
        DecodeError: the file is truncated or damaged, has another size where `resize` is "refuse", or the members
            take neither one channel nor three.
    """
    channels, height, width = spec.shape
    if channels not in MODES:
        raise DecodeError(
            f"this ensemble takes {channels} channels; an encoded image has 1 (grey) or 3 (RGB). Send arrays instead."
        )
    if spec.resize == "refuse" and image.size not in ((width, height), (height, width)):  # before a pixel is decoded
        raise DecodeError(_another_size(image, width, height))
    try:
        image = ImageOps.exif_transpose(image)
        image = _scaled_16_bit(image) if image.mode.startswith("I") else _on_white(image, MODES[channels])
        if image.size != (width, height):
            image = _resized(image, width, height, spec.resize)
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"the image cannot be decoded ({_said(error)}). Is the file truncated or damaged?") from None
    pixels = np.asarray(image, np.float32)
    if image.mode != "F":
        pixels = pixels / np.float32(255)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(np.broadcast_to(planes, spec.shape))


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _scaled_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    pixels = np.clip(values / 65535, 0, 1)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[values == transparent] = 1
    return Image.fromarray(pixels)  # mode F


def _resized(image: Image.Image, width: int, height: int, how: str) -> Image.Image:
    if how == "refuse":
        raise DecodeError(_another_size(image, width, height))
    if how == "stretch":
        return _bilinear(image, width, height)
    if max(image.size) > MAX_ASPECT * min(image.size):  # scaling it before the crop could need unbounded memory
        raise DecodeError(f"the image is {image.width} × {image.height} pixels, a strip. Crop it.")
    # Same as torchvision's Resize and CenterCrop: the side that fits is exact, the other is rounded down.
    if image.width * height < image.height * width:
        image = _bilinear(image, width, int(width * image.height / image.width))
    else:
        image = _bilinear(image, int(height * image.width / image.height), height)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _another_size(image: Image.Image, width: int, height: int) -> str:
    return f"the image is {image.width} × {image.height} pixels; this ensemble takes {width} × {height}. Resize it."


def _bilinear(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _said(error: Any) -> str:
    # Pillow's messages may contain the memory address of a buffer, which is cut off here.
    return str(error).split(" <")[0] or type(error).__name__
