"""Random crop and flip of a whole batch at once, on the batch's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Augment:
    """Pad by `crop` black pixels and cut a random window of the original size; mirror half of the images if `flip`."""

    crop: int = 0
    flip: bool = False

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment a batch; each image gets its own window and flip.

        Args:
            images: (batch, C, H, W), before normalisation, so that 0 is black.
            generator: on the CPU, so that the draws do not depend on the device.
        """
        if not (self.crop or self.flip):  # images or any other inputs
            return images
        batch, _, height, width = images.shape
        if self.crop:
            corners = torch.randint(0, 2 * self.crop + 1, (2, batch), generator=generator).to(images.device)
            padded = functional.pad(images, [self.crop] * 4)
            rows = corners[0, :, None] + torch.arange(height, device=images.device)  # (batch, H)
            columns = corners[1, :, None] + torch.arange(width, device=images.device)  # (batch, W)
            every = torch.arange(batch, device=images.device)[:, None, None]
            # Indices around a slice put the sliced axis last: (batch, H, W, C).
            images = padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.flip:
            mirror = (torch.rand(batch, generator=generator) < 0.5).to(images.device)
            images = torch.where(mirror[:, None, None, None], images.flip(3), images)
        return images
