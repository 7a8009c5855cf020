"""What is attacked: the networks of each training seed, the services over them, and the networks that answer for attackers who know them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from benchmarks.defense import arms, whitebox
from benchmarks.defense.arms import Oracle
from models_store.store import Store, Version
from training import curve, data, espro, independent
from training.data import Data

SIGMA = 0.006  # of noise: what costs no accuracy to speak of
EPSILON = 5 / 255  # in L∞; of 8-bit levels, because `keyed` answers about those
POINTS = 32  # of a bank that attackers with its weights attack together


@dataclass(frozen=True, eq=False)
class Size:
    """What is trained, and how much of it is attacked."""

    label: str
    common: dict[str, Any]
    epochs: int
    bank: int
    images: int
    budget: int
    seeds: tuple[int, ...]
    epsilons: tuple[float, ...]  # beside EPSILON
    again: int  # how often a success is asked again
    surrogate: int  # answers that a surrogate's maker asks for; no more than `budget` for each image

    @functools.cache  # noqa: B019 (there are two)
    def version(self, of: str, seed: int) -> Version:
        """Of one of the methods below; trained if it is missing."""
        return getattr(self, of)(seed)

    def networks(self, seed: int) -> Version:
        """Three, each by itself."""
        options = {"runs": 3, "epochs": self.epochs, **self.common}
        return independent.run(independent.Config(name=f"{self.label}-networks-{seed}", seed=seed, **options))

    def path(self, seed: int) -> Version:
        """A curve between the first two."""
        ends = tuple(f"{self.version('networks', seed).name}/{i}" for i in (0, 1))
        options = {"endpoints": ends, "epochs": 2 * self.epochs, "curve_lr": 0.1, "members": 6, "bank": self.bank}
        return curve.run(curve.Config(name=f"{self.label}-curve-{seed}", seed=seed, **options, **self.common))

    def simplex(self, seed: int) -> Version:
        """Around the first one."""
        options = {
            "vertices": 3,
            "vertex_epochs": self.epochs // 2,
            "volume_weight": 0.6,
            "samples": 6,
            "bank": self.bank,
            **self.common,
        }
        base = (f"{self.version('networks', seed).name}/0",)
        return espro.run(espro.Config(name=f"{self.label}-simplex-{seed}", seed=seed, base=base, **options))

    def hardened(self, seed: int) -> Version:
        """Trained adversarially, as far as its accuracy bears it."""
        return self._adversarially(f"hardened-{seed}", seed, epsilon=2 / 255, share=0.5, epochs=3 * self.epochs // 2)

    def hardest(self, seed: int) -> Version:
        """Trained on nothing but the worst images within what is attacked."""
        return self._adversarially(f"hardest-{seed}", seed, epsilon=EPSILON, share=1.0, epochs=self.epochs)

    def _adversarially(self, name: str, seed: int, *, epsilon: float, share: float, epochs: int) -> Version:
        options = {"adversarial_epsilon": epsilon, "adversarial_steps": 2, "adversarial_share": share, "runs": 1}
        name = f"{self.label}-{name}"
        return independent.run(independent.Config(name=name, seed=seed, epochs=epochs, **options, **self.common))

    @functools.cached_property
    def data(self) -> Data:
        """That all of them know."""
        config = independent.Config(**self.common)
        return data.load(config.data_options())

    def test(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Test images of this training seed alone, (count, C, H, W), and their labels: so that all cells of an arm are independent."""
        images, labels = data.as_arrays(self.data.test)
        own = slice(seed * count, (seed + 1) * count)
        return images[own], labels[own]


FASHION = Size(
    label="defense",
    common={"dataset": "fashion-mnist", "network": "preresnet8", "bn_images": 2048, "activate": False},
    epochs=6,
    bank=64,
    images=100,
    budget=1000,
    seeds=(0, 1),
    epsilons=(20 / 255, 77 / 255),
    again=100,
    surrogate=12_000,
)
SMOKE = Size(
    label="smoke",
    common={"dataset": "digits", "network": "mlp", "lr": 0.05, "activate": False},
    epochs=4,
    bank=8,
    images=4,
    budget=40,
    seeds=(0,),
    epsilons=(77 / 255,),
    again=5,
    surrogate=160,
)


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    label: str
    of: str  # what Size trains
    mode: str
    noise: float = 0.0
    unmatched: bool = False  # its clean accuracy is another: beside the comparison
    briefly: bool = False  # attacked at one ε with one budget, and with no surrogate

    def oracle(self, size: Size, seed: int) -> Oracle:
        """Into it; no answer is counted yet."""
        found = _opened(self, size, seed)
        found.answers = 0
        return found


@functools.cache
def _opened(arm: Arm, size: Size, seed: int) -> Oracle:
    name = size.version(arm.of, seed).name
    if arm.mode == "fixed":  # its first network alone
        return arms.fixed(Store(), name, 0, noise=arm.noise)
    return arms.oracle(Store(), name, arm.mode, noise=arm.noise)  # pyright: ignore[reportArgumentType]


ARMS = [
    Arm("one network", "networks", "fixed"),
    Arm("mean of 6 points of the curve", "path", "average", unmatched=True),  # errs less than each of them
    Arm("random, curve", "path", "random"),
    Arm("keyed, curve", "path", "keyed"),
    Arm("one network, noise", "networks", "fixed", SIGMA),
    Arm("random, curve, noise", "path", "random", SIGMA),
    Arm("one network, adversarially trained", "hardened", "average"),
    Arm("random, 3 independent networks", "networks", "random", briefly=True),
    Arm("adversarially trained, at the attacked ε", "hardest", "average", unmatched=True, briefly=True),
    Arm("random, simplex", "simplex", "random", briefly=True),
]


def answering(size: Size, arm: Arm, seed: int) -> list[nn.Module]:
    """The networks that answer, one of them each time, as torch modules; of a bank POINTS of them."""
    version, of = size.version(arm.of, seed), (size.data.mean, size.data.std)
    if arm.mode in ("random", "keyed") and version.manifest.bank:
        several = version.manifest.bank.points
        found = whitebox.torch_points(
            version, *of, np.linspace(0, several - 1, min(several, POINTS)).astype(int).tolist()
        )
    else:
        found = whitebox.torch_members(version, *of)
    if arm.mode == "fixed":
        found = found[:1]
    if arm.mode == "average":
        found = [whitebox.Mean(found, version.manifest.temperature)]
    return [whitebox.Noisy(network, arm.noise) for network in found] if arm.noise else found  # pyright: ignore[reportReturnType]
