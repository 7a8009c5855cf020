"""Networks of torchvision, timm and transformers by name. The last two are optional; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models_store.manifest import PADDING
from training.errors import NetworkError

Factory = Callable[..., nn.Module]


class GreyToRGB(nn.Module):
    """Repeats a grey image three times, for a network that was built for three channels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, H, W) -> logits."""
        return self.network(images.expand(-1, 3, -1, -1))


class LogitsOf(nn.Module):
    """A classifier of transformers: its logits alone, and for texts its mask from the padding."""

    def __init__(self, network: nn.Module, *, texts: bool):
        super().__init__()
        self.network, self.texts = network, texts

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Images (batch, C, H, W), or token ids (batch, length) -> logits."""
        if self.texts:
            return self.network(input_ids=inputs, attention_mask=(inputs != PADDING).long()).logits
        return self.network(pixel_values=inputs).logits


def torchvision(name: str) -> Factory:
    """A classifier of torchvision, with random initial weights.

    Raises:
        NetworkError: torchvision has no such classifier.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise NetworkError(
            f"torchvision has no classifier {name!r}; for example torchvision:resnet18, torchvision:vit_b_16."
        )

    def make(num_classes: int, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
        if name in ("googlenet", "inception_v3"):  # by default their training output is a tuple
            options = {"aux_logits": False, "init_weights": True, **options}
        if name.startswith("vit_"):
            options = {"image_size": input_shape[1], **options}
        network = models.get_model(name, weights=None, num_classes=num_classes, **options)
        return GreyToRGB(network) if input_shape[0] == 1 else network

    return make


def timm(name: str) -> Factory:
    """A classifier of timm, with random initial weights; give pre-trained ones with --init.

    Raises:
        NetworkError: timm is not installed, or has no such classifier.
    """
    try:
        import timm as library
    except ImportError:
        raise NetworkError(f"The network timm:{name} needs timm: pip install timm.") from None
    if not library.is_model(name):
        near = ", ".join(library.list_models(f"*{name[:6]}*")[:5])
        raise NetworkError(f"timm has no classifier {name!r}" + (f"; similar ones are {near}." if near else "."))

    def make(num_classes: int, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
        return library.create_model(name, pretrained=False, num_classes=num_classes, in_chans=input_shape[0], **options)

    return make


def transformers(path: str) -> Factory:
    """A classifier of images or texts of transformers, from a local folder with config.json.

    Raises:
        NetworkError: transformers is not installed, or the folder holds no such classifier.
    """
    try:
        import transformers as library
    except ImportError:
        raise NetworkError(f"The network transformers:{path} needs transformers: pip install transformers.") from None
    if not (Path(path) / "config.json").is_file():
        raise NetworkError(f"transformers:{path} must name a local folder with config.json; nothing is downloaded.")
    trained = any(
        (Path(path) / name).exists()
        for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    )

    def make(num_classes: int, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
        texts = len(input_shape) == 1
        kind: Any = library.AutoModelForSequenceClassification if texts else library.AutoModelForImageClassification
        given = {"num_labels": num_classes, **options}
        if trained:
            return LogitsOf(
                kind.from_pretrained(path, local_files_only=True, ignore_mismatched_sizes=True, **given), texts=texts
            )
        config = library.AutoConfig.from_pretrained(path, local_files_only=True, **given)
        return LogitsOf(kind.from_config(config), texts=texts)

    return make


FACTORIES: dict[str, Callable[[str], Factory]] = {
    "torchvision": torchvision,
    "timm": timm,
    "transformers": transformers,
}
