"""Transforms of torchvision by name, applied to training images: RandAugment, ColorJitter, …, and mixup and cutmix."""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.errors import DataError

TOLERANCE = 1e-3  # by which interpolation may leave [0, 1]
MIXING = ("mixup", "cutmix")
Apply = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Transformed:
    """The augmentation of a data set, followed by transforms of each image."""

    first: Apply
    each: Sequence[Any]  # torchvision's transforms

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Transform a batch (batch, C, H, W) of pixels in [0, 1]; each image has draws of its own."""
        images = self.first(images, generator)
        if not self.each:
            return images
        with _drawing_from(generator):
            return torch.stack([self._one(image) for image in images])

    def _one(self, image: torch.Tensor) -> torch.Tensor:
        for transform in self.each:
            changed = transform(image)
            if changed.shape != image.shape:
                raise DataError(
                    f"--transforms: {type(transform).__name__} made {tuple(changed.shape)} of an image of {tuple(image.shape)}. Images must keep their size."
                )
            image = changed
        return image.clamp(0, 1)


@dataclass(frozen=True)
class Mixing:
    """mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of a batch: one of the given ones is drawn for each batch."""

    ways: tuple[Any, ...] = ()

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch.

        Returns:
            Images, and labels: as they are without a way, otherwise as shares of the classes, float (batch, classes).
        """
        if not self.ways:
            return images, labels
        with _drawing_from(generator):
            return self.ways[int(torch.randint(len(self.ways), ()))](images, labels)


def parse(names: Sequence[str], shape: Sequence[int], classes: int) -> tuple[list[Any], Mixing]:
    """The transforms of each image, and those that mix images.

    Args:
        names: such as RandAugment, ColorJitter:brightness=0.2,hue=0.1 or mixup:alpha=0.4.
        shape: (C, H, W) of an image.
        classes: number of classes.

    Raises:
        DataError: a transform is unknown, its arguments are wrong, or it cannot be applied to such images.
    """
    each, ways = list[Any](), list[Any]()
    for text in names:
        name, _, given = text.partition(":")
        kind = _kind(name)
        kwargs = _arguments(text, given)
        if name.lower() in MIXING:
            if "num_classes" in kwargs:
                raise DataError(f"--transforms {text}: leave num_classes out; the data set has {classes} classes.")
            kwargs = {"num_classes": classes, **kwargs}
        try:
            made = kind(**kwargs)
        except (TypeError, ValueError) as error:
            takes = ", ".join(list(inspect.signature(kind).parameters))
            raise DataError(f"--transforms {text}: {error}. It takes {takes}.") from None
        (ways if name.lower() in MIXING else each).append(made)
        if name.lower() not in MIXING:
            _try(text, made, shape)
    return each, Mixing(tuple(ways))


def _kind(name: str) -> Any:
    from torchvision.transforms import v2

    known = {
        key.lower(): kind
        for key, kind in vars(v2).items()
        if inspect.isclass(kind) and issubclass(kind, v2.Transform) and kind is not v2.Transform
    }
    if name.lower() not in known:
        raise DataError(
            f"--transforms: torchvision.transforms.v2 has no transform {name!r}; for example RandAugment, TrivialAugmentWide, ColorJitter:hue=0.1, "
            "mixup, cutmix."
        )
    return known[name.lower()]


def _arguments(text: str, given: str) -> dict[str, Any]:
    # Read as the arguments of a call, so that values may be lists.
    try:
        call = ast.parse(f"f({given})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise DataError(
            f"--transforms {text}: arguments have the form NAME:key=value,key=value, for example ColorJitter:brightness=0.2,hue=0.1."
        ) from None


def _try(text: str, transform: Any, shape: Sequence[int]) -> None:
    image = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0))
    with _drawing_from(torch.Generator().manual_seed(0)):
        for _ in range(4):
            try:
                found = transform(image)
            except Exception as error:  # the exceptions of transforms share no base class
                raise DataError(
                    f"--transforms {text} fails on an image of {tuple(shape)}, float32: {type(error).__name__}: {error}."
                ) from None
            if not isinstance(found, torch.Tensor) or found.shape != image.shape or found.dtype != image.dtype:
                what = (
                    f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
                )
                raise DataError(
                    f"--transforms {text} makes {what} of an image of {tuple(shape)}, float32. Images must keep their size and type: choose "
                    "another size (RandomResizedCrop:size=…), or --image-size."
                )
            if float(found.min()) < -TOLERANCE or float(found.max()) > 1 + TOLERANCE:
                raise DataError(
                    f"--transforms {text} makes values from {float(found.min()):.3g} to {float(found.max()):.3g}; pixels stay in [0, 1]. Leave "
                    "normalisation out: the network does it (--mean, --std)."
                )


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator) -> Generator[None]:
    """Within it, torch's global generator draws from a seed that `generator` gives; after it, it is as before."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
