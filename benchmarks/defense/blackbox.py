"""Attacks that ask, through a well-kept library, adapted to answers that differ: they average, and jitter.

Square (Andriushchenko et al. 2020) climbs on probabilities, HopSkipJump (Chen et al. 2020) walks along the border on labels alone; both as the
Adversarial Robustness Toolbox has them, with the changes that are said where they are made.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
from art.attacks.evasion import HopSkipJump, SquareAttack
from art.estimators.classification.blackbox import BlackBoxClassifier, BlackBoxClassifierNeuralNetwork
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.defense.arms import CLASSES, Array, Oracle

Images = NDArray[np.float32]
JITTER = 1 / 255  # of one pixel: as far as `keyed` must be asked to answer anew
IDLE = 200  # questions in a row that were asked before
# Of the distance: how exactly HopSkipJump finds the border; its probes are off by √pixels times that in each pixel, 0.28 of the distance of 28 × 28. The library's own choice
# (0.01 / pixels) drowns in the difference between networks, lies within one cell of `keyed`, and spends most answers on the border's last digits; this one does no worse on a
# fixed network.
THETA = 0.01
BEGINNINGS = 10  # images of other classes that HopSkipJump may begin at, the nearest first


class Asker:
    """What the library takes for a classifier: the mean of `m` answers."""

    def __init__(self, oracle: Oracle, m: int, *, labels: bool, jitter: bool, seed: int, budget: int | None = None):
        """`labels`: only those are looked at. `jitter`: each of the answers is to another image nearby. `budget`: of answers; then SpentError."""
        self._left, self._idle = budget, 0
        self._oracle, self._m, self._labels, self._jitter = oracle, m, labels, jitter
        self._same = oracle.repeats and not jitter
        self._generator = np.random.default_rng(seed)
        self._known: dict[bytes, Array] = {}

    def anew(self, images: Images) -> Array:
        """(batch, classes); asked again, unless the same question has the same answer: so that a lucky answer is not believed for long."""
        if not self._same:
            self._known = {}
        return self(images)

    def __call__(self, images: Images) -> Array:
        """(batch, classes); what was just asked is not asked again."""
        images = np.asarray(images, np.float32)
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        # The library may go on for ever about images that it has asked before.
        self._idle = 0 if new else self._idle + 1
        if self._left is not None and self._idle > IDLE:
            raise SpentError
        for i, found in zip(new, self._mean(images[new]) if new else (), strict=True):
            self._known[keys[i]] = found
        return np.stack([self._known[key] for key in keys])

    @contextlib.contextmanager
    def single(self) -> Iterator[None]:
        """For a while, no averaging."""
        m, self._m = self._m, 1
        try:
            yield
        finally:
            self._m = m

    def _mean(self, images: Images) -> Array:
        total = np.zeros((len(images), CLASSES))
        times = 1 if self._same else self._m
        for _ in range(times):
            if self._left is not None and self._left < len(images):
                raise SpentError
            self._left = None if self._left is None else self._left - len(images)
            asked = images
            if self._jitter:
                asked = self._jittered(images)
            answer = self._oracle.ask(asked)
            total += np.eye(CLASSES)[answer.argmax(1)] if self._labels else answer
        return total / times

    def _jittered(self, images: Images) -> Images:
        """One pixel of each, one level off."""
        moved = images.reshape(len(images), -1).copy()
        rows, pixels = np.arange(len(images)), self._generator.integers(moved.shape[1], size=len(images))
        up = moved[rows, pixels] < 0.5
        moved[rows, pixels] += np.where(up, JITTER, -JITTER).astype(np.float32)
        return moved.reshape(images.shape)


def square(
    oracle: Oracle, images: Images, labels: NDArray[np.int64], epsilon: float, budget: int, m: int, *, jitter: bool = False, seed: int = 0
) -> Images:  # fmt: skip
    """The last images of Square in L∞, after `budget` answers for each."""
    asker = Asker(oracle, m, labels=False, jitter=jitter, seed=seed)
    # A step asks for the image it holds and for a new one; where the same question has the same answer, for the new one only.
    steps = budget - 3 if oracle.repeats and not jitter else (budget - 3 * m) // (2 * m)
    if steps < 1:
        raise ValueError(f"{budget} answers are too few for a step of Square that averages {m}")
    model = BlackBoxClassifierNeuralNetwork(asker.anew, images.shape[1:], CLASSES, clip_values=(0.0, 1.0))

    def margin(x: Images, y: Array) -> Array:
        probs = asker(x)
        right = (probs * y).sum(1)
        return right - (probs - 2 * y).max(1)

    np.random.seed(seed)  # what the library draws from
    # The library leaves an image alone once it was answered wrongly: right where answers repeat; else one lucky network ends the attack.
    criterion = None if oracle.repeats and oracle.turn is None else lambda probs, truth: np.zeros(len(probs), bool)
    attack = SquareAttack(
        model, norm=np.inf, eps=epsilon, max_iter=steps, loss=margin, adv_criterion=criterion, batch_size=len(images), verbose=False
    )  # fmt: skip
    return attack.generate(images, y=np.eye(CLASSES)[labels])


class SpentError(Exception):
    """As many answers as there were for this image have been given."""


class Border(HopSkipJump):
    """HopSkipJump where answers differ: the label is known and not asked, directions come from single answers, and what was held last is kept.

    The library would ask anew whether the image it holds is still wrong, and begin from noise where one answer says no.
    """

    def __init__(self, asker: Asker, model: BlackBoxClassifier, label: int, evaluations: int):
        super().__init__(
            model, norm=np.inf, max_iter=10_000, init_eval=evaluations, max_eval=4 * evaluations, verbose=False
        )
        self._asker, self._label = asker, label
        self.theta = THETA
        self.held: Images | None = None

    def _perturb(self, x, y, y_p, init_pred, adv_init, mask, clip_min, clip_max):  # pyright: ignore
        return super()._perturb(x, y, self._label, init_pred, adv_init, mask, clip_min, clip_max)

    def _init_sample(self, x, y, y_p, init_pred, adv_init, mask, clip_min, clip_max):  # pyright: ignore
        return adv_init.astype(np.float32), y_p

    def _compute_delta(self, *args, **kwargs):  # pyright: ignore
        return max(
            super()._compute_delta(*args, **kwargs), 1e-6
        )  # it divides by that, also where the image itself is wrong

    def _binary_search(self, *args, **kwargs):  # pyright: ignore
        self.held = super()._binary_search(*args, **kwargs)
        return self.held

    def _compute_update(self, *args, **kwargs):  # pyright: ignore
        with self._asker.single():
            return super()._compute_update(*args, **kwargs)


def hop_skip_jump(
    oracle: Oracle,
    images: Images,
    labels: NDArray[np.int64],
    budget: int,
    m: int,
    *,
    jitter: bool = False,
    seed: int = 0,
) -> Images:
    """The nearest images in L∞ that HopSkipJump finds with `budget` answers for each; it begins at an image of another class."""
    found = []
    np.random.seed(seed)
    for image, label in zip(tqdm(images, "HopSkipJump", leave=False, disable=None), labels, strict=True):
        asker = Asker(oracle, m, labels=True, jitter=jitter, seed=seed, budget=budget)
        model = BlackBoxClassifier(asker.anew, images.shape[1:], CLASSES, clip_values=(0.0, 1.0))
        attack = Border(asker, model, int(label), evaluations=50)
        others = images[labels != label]
        near = others[np.abs(others - image).mean(axis=(1, 2, 3)).argsort()[:BEGINNINGS]]
        begin = near[0]
        with contextlib.suppress(SpentError):
            begin = next((one for one in near if asker.anew(one[None]).argmax() != label), begin)
            attack.generate(image[None], y=np.eye(CLASSES)[[label]], x_adv_init=begin[None].copy())
        found.append(begin if attack.held is None else attack.held.reshape(image.shape))
    return np.stack(found)


def outward(found: Images, images: Images, epsilon: float) -> Images:
    """On through a border that was found, as far as the ball goes: where answers differ, half of them are still right at the border itself."""
    distance = np.abs(found - images).max(axis=(1, 2, 3), keepdims=True)
    # An image that was wrong to begin with stays where it is.
    further = np.where(distance > THETA * epsilon, np.maximum(1.0, epsilon / np.maximum(distance, 1e-9)), 1.0)
    return (images + (found - images) * further).astype(np.float32)
