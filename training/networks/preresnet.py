"""Pre-activation residual networks for small images (He et al. 2016, "Identity Mappings in Deep Residual Networks").

Depth 6n+2 with basic blocks or 9n+2 with bottlenecks; three stages of 16, 32, 64 channels times `width`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from training.errors import NetworkError


def make(
    num_classes: int,
    input_shape: tuple[int, int, int],
    *,
    depth: int,
    width: float = 1.0,
    bottleneck: bool | None = None,
) -> nn.Module:
    """PreResNet of the given depth. Bottlenecks are the default from depth 110 on if the depth is 9n+2 (110, 164, …).

    Raises:
        NetworkError: the depth does not exist.
    """
    if bottleneck is None:
        bottleneck = depth >= 110 and (depth - 2) % 9 == 0
    convolutions = 9 if bottleneck else 6
    if depth < convolutions + 2 or (depth - 2) % convolutions:
        kind = "bottleneck" if bottleneck else "basic"
        legal = ", ".join(str(convolutions * n + 2) for n in (1, 2, 3, 12, 18))
        raise NetworkError(
            f"preresnet{depth} does not exist with {kind} blocks: the depth is {convolutions}n+2 ({legal}, …)."
        )
    return PreResNet(
        num_classes, input_shape[0], (depth - 2) // convolutions, width, Bottleneck if bottleneck else Basic
    )


class Basic(nn.Module):
    """Two 3×3 convolutions, each after batch norm and ReLU."""

    expansion = 1

    def __init__(self, inner: int, planes: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), _conv(inner, planes, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), _conv(planes, planes, 3, 1)
        self.shortcut = _shortcut(inner, planes, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, inner, H, W) -> (batch, planes, H/stride, W/stride)."""
        y = self.conv1(torch.relu(self.bn1(x)))
        y = self.conv2(torch.relu(self.bn2(y)))
        return y + self.shortcut(x)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions, each after batch norm and ReLU."""

    expansion = 4

    def __init__(self, inner: int, planes: int, stride: int):
        super().__init__()
        out = planes * self.expansion
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), _conv(inner, planes, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), _conv(planes, planes, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), _conv(planes, out, 1, 1)
        self.shortcut = _shortcut(inner, out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, inner, H, W) -> (batch, 4·planes, H/stride, W/stride)."""
        y = self.conv1(torch.relu(self.bn1(x)))
        y = self.conv2(torch.relu(self.bn2(y)))
        y = self.conv3(torch.relu(self.bn3(y)))
        return y + self.shortcut(x)


class PreResNet(nn.Module):
    """Three stages of `blocks` blocks; the second and third halve the image."""

    def __init__(
        self,
        num_classes: int,
        channels: int,
        blocks: int,
        width: float,
        block: Callable[[int, int, int], nn.Module],
    ):
        super().__init__()
        planes = [max(1, round(p * width)) for p in (16, 32, 64)]
        expansion: int = block.expansion  # pyright: ignore[reportFunctionMemberAccess]
        self.stem = _conv(channels, planes[0], 3, 1)
        stages: list[nn.Module] = []
        inner = planes[0]
        for stage, width_of in enumerate(planes):
            for index in range(blocks):
                stages.append(block(inner, width_of, 2 if stage > 0 and index == 0 else 1))
                inner = width_of * expansion
        self.blocks = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(inner)
        self.head = nn.Linear(inner, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, C, H, W) -> logits."""
        features = torch.relu(self.bn(self.blocks(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))


def _conv(inner: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(inner, out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _shortcut(inner: int, out: int, stride: int) -> nn.Module:
    return nn.Identity() if inner == out and stride == 1 else _conv(inner, out, 1, stride)
