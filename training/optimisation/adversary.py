"""Adversarial training (Madry et al. 2018, eq. 2.1): steps train on images that gradient ascent makes worse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
STEP = 2.5  # total length of the attack's steps, in units of epsilon, as in the paper


@dataclass(frozen=True)
class Adversary:
    """Projected gradient ascent in L∞, from a random start."""

    epsilon: float  # largest change of a pixel, in [0, 1]
    steps: int
    share: float  # of each batch that is changed
    mean: torch.Tensor  # (1, C, 1, 1): what the images were normalised with
    std: torch.Tensor

    def attack(
        self,
        network: nn.Module,
        loss: Loss,
        images: torch.Tensor,
        labels: torch.Tensor,
        autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> torch.Tensor:
        """Returns normalised images (batch, C, H, W), the first `share` of them changed. Pixels stay in [0, 1]."""
        count = round(self.share * len(images))
        clean, labels = images[:count], labels[:count]
        if not count:
            return images
        room = self.epsilon / self.std
        lowest, highest = -self.mean / self.std, (1 - self.mean) / self.std
        moved = clean + room * (2 * torch.rand_like(clean) - 1)
        for _ in range(self.steps):
            moved = moved.clamp(lowest, highest).detach().requires_grad_()
            with autocast():
                worse = loss(network(moved), labels)
            (gradient,) = torch.autograd.grad(worse, moved)
            moved = moved.detach() + STEP / self.steps * room * gradient.sign()
            moved = clean + (moved - clean).clamp(-room, room)
        return torch.cat([moved.clamp(lowest, highest).detach(), images[count:]])
