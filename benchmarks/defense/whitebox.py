"""Attacks that know all weights: PGD, PGD over the expectation (EOT, Athalye et al. 2018), ARC (Dbouk and Shanbhag 2022), AutoAttack (Croce and Hein 2020).

What answers is a list of modules, one of which answers each question, all equally likely: a fixed service is a list of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from models_store.bank import Bank
from models_store.store import Version
from training import networks
from training.members.export import Normalised

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
PREFIX = "network."
LOOKS = 16  # at networks with noise, when it is counted how many are fooled


class Noisy(nn.Module):
    """A network with Gaussian noise on its input, other noise each time."""

    def __init__(self, network: nn.Module, sigma: float):
        super().__init__()
        self.network, self.sigma = network, sigma

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, C, H, W) -> logits, (batch, classes)."""
        return self.network((images + self.sigma * torch.randn_like(images)).clamp(0, 1))


class Mean(nn.Module):
    """The logarithm of the networks' mean probability, each under the same temperature."""

    def __init__(self, members: Sequence[nn.Module], temperature: float):
        super().__init__()
        self.members, self.temperature = nn.ModuleList(members), temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, C, H, W) -> log-probabilities, (batch, classes)."""
        each = [functional.log_softmax(member(images) / self.temperature, 1) for member in self.members]
        return torch.stack(each).logsumexp(0) - float(np.log(len(each)))


def torch_members(version: Version, mean: Sequence[float], std: Sequence[float]) -> list[nn.Module]:
    """Its members as torch modules on images in [0, 1]."""
    from safetensors.torch import load_file

    found: list[nn.Module] = []
    for member in version.manifest.members:
        assert member.weights is not None
        found.append(_module(version, load_file(version.folder / member.weights), mean, std))
    return found


def torch_points(
    version: Version, mean: Sequence[float], std: Sequence[float], numbers: Sequence[int]
) -> list[nn.Module]:
    """Points of its bank, likewise."""
    bank = Bank.load(version.folder / "bank")
    found: list[nn.Module] = []
    for number in numbers:
        weights = bank.weights(number).items()
        state = {name.removeprefix(PREFIX): torch.from_numpy(value.copy()) for name, value in weights}
        found.append(_module(version, state, mean, std))
    return found


def _module(version: Version, state: dict[str, torch.Tensor], mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    manifest = version.manifest
    assert manifest.network is not None
    network = networks.build(
        manifest.network.factory, len(manifest.classes), manifest.input.shape, manifest.network.kwargs
    )
    network.load_state_dict(network.state_dict() | state)
    # Channels last: convolutions on a CPU are a fifth faster so.
    return Normalised(network, mean, std).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def pgd(
    answering: Sequence[nn.Module], images: Images, labels: Labels, epsilon: float, *, steps: int = 40, each: int = 4, seed: int = 0
) -> Images:  # fmt: skip
    """Ascent on the loss of the mean probability of `each` networks that every step draws anew; from a random start for each of two losses.

    Of the two the image that fools more of the networks is kept.
    """
    torch.manual_seed(seed)
    draws = np.random.default_rng(seed)
    start, truth = torch.from_numpy(images), torch.from_numpy(labels)
    # A network with noise may be drawn several times: each time with other noise.
    count = 2 * each if isinstance(answering[0], Noisy) else min(len(answering), each)
    best = start.clone()
    most = torch.full((len(start),), -1.0)
    for loss in (_nll, _margin):
        moved = _into(start + epsilon * (2 * torch.rand_like(start) - 1), start, epsilon)
        for step in range(steps):
            drawn = draws.choice(len(answering), count, replace=len(answering) < count)
            moved.requires_grad_()
            several = torch.stack([functional.log_softmax(answering[i](moved), 1) for i in drawn])
            (gradient,) = torch.autograd.grad(loss(several, truth), moved)
            length = epsilon / 4 * (1 - step / steps)
            moved = _into(moved.detach() + length * gradient.sign(), start, epsilon)
        fooled = _fooled(answering, moved, truth)
        best = torch.where((fooled > most).view(-1, 1, 1, 1), moved, best)
        most = torch.maximum(most, fooled)
    return best.numpy()


def _nll(several: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of the mean probability; `several` are log-probabilities, (networks, batch, classes)."""
    return functional.nll_loss(several.logsumexp(0), truth)


def _margin(several: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How far the best other class leads, the mean over the networks: it does not fade where a network is sure (Carlini and Wagner 2017)."""
    own = several.gather(2, truth.expand(len(several), -1)[..., None])[..., 0]
    others = several.scatter(2, truth.expand(len(several), -1)[..., None], -torch.inf).amax(2)
    return (others - own).clamp(max=1.0).mean()  # beyond that the network is fooled


def arc(
    answering: Sequence[nn.Module], images: Images, labels: Labels, epsilon: float, *, rounds: int = 20, nearest: int = 4, seed: int = 0
) -> Images:  # fmt: skip
    """ARC in L∞, over the borders to the `nearest` classes: each network in turn pulls the image over its own border.

    The pull is so long that the image also stays beyond it after it is cut back to the ball; it is taken back where fewer networks are fooled then.
    Each round tries its direction over the whole of ε and over a quarter.
    """
    generator = np.random.default_rng(seed)
    start, truth = torch.from_numpy(images), torch.from_numpy(labels)
    moved, most = start.clone(), _fooled(answering, start, truth)
    for _ in range(rounds):
        local, most_here = torch.zeros_like(start), most.clone()
        for number in generator.permutation(len(answering)):
            distance, normal = _border(answering[number], moved, truth, nearest)
            along = (normal * local).flatten(1).sum(1)
            needed = epsilon / (epsilon - distance).clamp_min(1e-10) * (distance - along).abs() + 0.05 * epsilon
            # The first one to pull, and one whose border lies beyond the ball, pull as far as it goes.
            far = (local.flatten(1).abs().amax(1) == 0) | (distance >= epsilon)
            pull = torch.where(far, epsilon, needed)
            tried = local + pull.view(-1, 1, 1, 1) * normal.sign()
            tried *= epsilon / tried.flatten(1).abs().amax(1).clamp_min(1e-10).view(-1, 1, 1, 1)
            fooled = _fooled(answering, _into(moved + tried, start, epsilon), truth)
            local = torch.where((fooled >= most_here).view(-1, 1, 1, 1), tried, local)
            most_here = torch.maximum(most_here, fooled)
        for part in (1.0, 0.25):
            tried = _into(moved + part * local, start, epsilon)
            fooled = _fooled(answering, tried, truth)
            moved = torch.where((fooled >= most).view(-1, 1, 1, 1), tried, moved)
            most = torch.maximum(most, fooled)
    return moved.numpy()


def auto_attack(network: nn.Module, images: Images, labels: Labels, epsilon: float, *, seed: int = 0) -> Images:
    """The standard version's APGD, untargeted and at nine classes, for a service that answers the same again.

    Its FAB and its Square would take three quarters of the time; Square is attacked with by itself.
    """
    from pyautoattack import AutoAttack

    attack = AutoAttack(network, eps=epsilon, norm="Linf", seed=seed, version="standard")
    attack.attacks_to_run = ["apgd-ce", "apgd-t"]
    found, _ = attack.run_standard_evaluation(torch.from_numpy(images), torch.from_numpy(labels), batch_size=100)
    return found.numpy()


@torch.no_grad()
def error(model: nn.Module, images: Images, labels: Labels) -> float:
    """The share that a network gets wrong."""
    return float((model(torch.from_numpy(images)).argmax(1).numpy() != labels).mean())


def _into(images: torch.Tensor, start: torch.Tensor, epsilon: float) -> torch.Tensor:
    return (start + (images - start).clamp(-epsilon, epsilon)).clamp(0, 1)


def _border(
    network: nn.Module, images: torch.Tensor, truth: torch.Tensor, nearest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The way out of the true class over the network's nearest border, as far as it is straight: its length in L∞, (batch,), 0 where it is out
    already, and a normal of L1 norm 1.
    """
    images = images.detach().requires_grad_()
    logits = network(images)
    own = logits.gather(1, truth[:, None])
    others = logits.scatter(1, truth[:, None], -torch.inf).topk(nearest).indices
    distance = torch.full((len(images),), torch.inf)
    normal = torch.zeros_like(images)
    for other in others.T:
        lead = (own - logits.gather(1, other[:, None]))[:, 0]
        (gradient,) = torch.autograd.grad(lead.sum(), images, retain_graph=True)
        size = gradient.flatten(1).abs().sum(1) + 1e-10
        way = (lead.detach() / size).clamp_min(0)
        nearer = way < distance
        distance = torch.where(nearer, way, distance)
        normal = torch.where(nearer.view(-1, 1, 1, 1), -gradient / size.view(-1, 1, 1, 1), normal)
    return distance, normal


@torch.no_grad()
def _fooled(answering: Sequence[nn.Module], images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The share of answers that are wrong, (batch,)."""
    noisy = any(isinstance(network, Noisy) for network in answering)
    looks = [network for network in answering for _ in range(max(1, LOOKS // len(answering)) if noisy else 1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same noise each time, or the luckiest count would be believed
        return torch.stack([network(images).argmax(1) != truth for network in looks]).float().mean(0)
