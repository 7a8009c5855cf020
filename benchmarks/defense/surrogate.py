"""A network of the attacker's own, trained on nothing but the service's answers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from benchmarks.defense.arms import Oracle
from training import networks
from training.data import Data
from training.members.export import Normalised

EPOCHS, BATCH, RATE = 6, 64, 0.05
SHIFT = 2  # pixels


def trained(oracle: Oracle, images: NDArray[np.float32], splits: Data, answers: int, seed: int) -> nn.Module:
    """Asks for so many answers, about the images and about shifted copies of them, and learns the probabilities: on images in [0, 1]."""
    torch.manual_seed(1000 + seed)
    shown = shifted(torch.from_numpy(images), answers)
    told = torch.from_numpy(oracle.ask(shown.numpy())).float()
    own = networks.build("preresnet8", told.shape[1], images.shape[1:], {})  # pyright: ignore[reportArgumentType]
    network = Normalised(own, splits.mean, splits.std).train()
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=3e-4)
    batch = min(BATCH, len(shown))
    steps = EPOCHS * (len(shown) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(shown)).split(batch)[: len(shown) // batch]:
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(network(shown[rows]), told[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def shifted(images: torch.Tensor, count: int) -> torch.Tensor:
    """The images, then again and again with each moved by up to SHIFT pixels."""
    found = [images]
    while sum(map(len, found)) < count:
        down, right = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
        found.append(torch.roll(images, (down, right), (2, 3)))
    return torch.cat(found)[:count]
