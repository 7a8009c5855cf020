"""One attack on one arm, judged."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.defense import blackbox, judging, surrogate, whitebox
from benchmarks.defense.recipes import Arm, Size, answering
from training import data

OF_ARC = 8  # networks that ARC looks at
# To be raised where an attack changes what it finds: what was measured before is measured again.
VERSIONS = {
    "clean": 1,
    "none": 1,
    "noise": 1,
    "square": 1,
    "hopskipjump": 1,
    "endpoint": 1,
    "midpoint": 1,
    "surrogate": 1,
    "pgd": 1,
    "eot": 1,
    "arc": 1,
    "autoattack": 2,
}


def attack(size: Size, place: dict[str, Any], arm: Arm) -> dict[str, Any]:
    """One cell: attack an arm, ask again what came out."""
    seed, kind, m, epsilon = (place[key] for key in ("seed", "attack", "m", "epsilon"))
    images, labels = data.as_arrays(size.data.test) if kind == "clean" else size.test(place["images"], seed)
    oracle = arm.oracle(size, seed)
    jitter = kind.endswith("jittered")
    if kind == "clean":
        return {"error": float(np.mean(judging.judged(oracle, images, labels, again=1)["wrong"])), "answers": 0.0}
    if kind == "none":
        found = images
    elif kind == "noise":
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], images.shape)
        found = judging.within((images + epsilon * signs).astype(np.float32), images, epsilon)
    elif kind.startswith("square"):
        found = blackbox.square(oracle, images, labels, epsilon, place["budget"], m, jitter=jitter, seed=seed)
    elif kind.startswith("hopskipjump"):
        nearest = blackbox.hop_skip_jump(oracle, images, labels, place["budget"], m, jitter=jitter, seed=seed)
        found = judging.within(blackbox.outward(nearest, images, epsilon), images, epsilon)
    elif kind == "surrogate":
        own = surrogate.trained(oracle, data.as_arrays(size.data.validation)[0], size.data, size.surrogate, seed)
        found = whitebox.pgd([own], images, labels, epsilon, seed=seed)
    else:
        found = known(size, kind, arm, seed, images, labels, epsilon)
    answers = oracle.answers / len(images)
    return {**judging.judged(oracle, found, labels, size.again), "answers": answers}


def known(
    size: Size, kind: str, arm: Arm, seed: int, images: np.ndarray, labels: np.ndarray, epsilon: float
) -> np.ndarray:
    """Attacks with weights: the arm's own (pgd: one of its networks; eot, arc, autoattack), or those of one network elsewhere."""
    if kind in ("endpoint", "midpoint"):
        return _elsewhere(size, kind, seed, len(images), epsilon)
    networks = answering(size, arm, seed)
    if kind == "pgd":
        return whitebox.pgd([networks[len(networks) // 2]], images, labels, epsilon, seed=seed)
    if kind == "eot":
        return whitebox.pgd(networks, images, labels, epsilon, seed=seed)
    if kind == "arc":
        some = np.linspace(0, len(networks) - 1, min(len(networks), OF_ARC)).astype(int)
        return whitebox.arc([networks[i] for i in some], images, labels, epsilon, seed=seed)
    return whitebox.auto_attack(networks[0], images, labels, epsilon, seed=seed)


@functools.cache
def _elsewhere(size: Size, kind: str, seed: int, count: int, epsilon: float) -> np.ndarray:
    images, labels = size.test(count, seed)
    of = (size.data.mean, size.data.std)
    if kind == "endpoint":
        network = whitebox.torch_members(size.version("networks", seed), *of)[0]
    else:
        (network,) = whitebox.torch_points(size.version("path", seed), *of, [size.bank // 2])
    return whitebox.pgd([network], images, labels, epsilon, seed=seed)
