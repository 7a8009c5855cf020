"""VGG-16 for small images (Simonyan & Zisserman 2014), with the two-hidden-layer head used for CIFAR.

A stage's pooling is left out once the image is one pixel wide, so 28×28 and 8×8 images work too.
"""

from __future__ import annotations

from torch import nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def make(
    num_classes: int,
    input_shape: tuple[int, int, int],
    *,
    batch_norm: bool = False,
    width: float = 1.0,
    dropout: float = 0.5,
) -> nn.Module:
    """VGG-16; `width` scales every layer."""
    channels, height, side = input_shape[0], input_shape[1], min(input_shape[1:])
    wide = input_shape[2]
    features: list[nn.Module] = []
    for stage in STAGES:
        for planes in stage:
            out = max(1, round(planes * width))
            features.append(nn.Conv2d(channels, out, 3, padding=1, bias=not batch_norm))
            nn.init.kaiming_normal_(features[-1].weight, nonlinearity="relu")  # pyright: ignore[reportArgumentType]
            features += [nn.BatchNorm2d(out), nn.ReLU()] if batch_norm else [nn.ReLU()]
            channels = out
        if side >= 2:
            features.append(nn.MaxPool2d(2))
            height, wide, side = height // 2, wide // 2, side // 2
    hidden = max(1, round(512 * width))
    head = [
        nn.Dropout(dropout), nn.Linear(channels * height * wide, hidden), nn.ReLU(),
        nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, num_classes),
    ]  # fmt: skip
    # torch's default initial weights of a Linear layer shrink the signal by √6. Three times this, in a narrow VGG
    # without batch norm, and training does not get better than chance.
    for layer in (head[1], head[4]):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # pyright: ignore[reportArgumentType]
    return nn.Sequential(*features, nn.Flatten(), *head)
