"""The defended services, as an attacker meets them: a oracle that answers images, and counts its answers.

A oracle calls what POST /predict calls between a request's pixels and its answer: the draw, the members, the averaging, what the policy shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import numpy as np
from numpy.typing import NDArray

from models_store.store import Store
from models_store.uncertainty import softmax
from service.inference.ensemble import Ensembles
from service.inference.modes import pool
from service.inference.modes.draws import Keyed
from service.inference.opening import Ensemble
from service.inference.policy import Mode, Policy

Array = NDArray[np.float64]
CLASSES = 10
AT_ONCE = 500
SECRET = b"of the benchmark; only the clock below turns it"


@dataclass
class Clock:
    """What `keyed` takes for the time."""

    now: float = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


@dataclass
class Oracle:
    """One arm."""

    ask_images: Callable[[NDArray[np.float32]], Array]  # (batch, C, H, W) -> probabilities, (batch, classes)
    noise: float = 0.0  # standard deviation of what is added to every image that comes in
    turn: Callable[[], None] | None = None  # the key, where there is one
    repeats: bool = False  # does the same question get the same answer?
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng())
    answers: int = 0

    def ask(self, images: NDArray[np.float32]) -> Array:
        """Probabilities, (batch, classes); each image is an answer more."""
        self.answers += len(images)
        if self.noise:
            noise = self.generator.normal(scale=self.noise, size=images.shape)
            images = np.clip(images + noise, 0, 1).astype(np.float32)
        return np.concatenate([self.ask_images(images[i : i + AT_ONCE]) for i in range(0, len(images), AT_ONCE)])


def oracle(store: Store, name: str, mode: Mode, *, noise: float = 0.0) -> Oracle:
    """Into a published ensemble, in this process."""
    clock = Clock()
    policy = Policy(modes=(mode,), probabilities="exact")
    keyed = Keyed(SECRET, 1.0, None, clock)
    ensembles = Ensembles(store, "cpu", None, threads=1, policies={"*": policy}, keyed=keyed)
    ensemble = ensembles.open(name.partition("@")[0], store.resolve(name).manifest.version)

    def turn() -> None:
        clock.now += 1

    return Oracle(
        lambda images: answered(ensemble, mode, images),
        noise,
        turn if mode == "keyed" else None,
        repeats=mode != "random" and not noise,
    )


def fixed(store: Store, name: str, number: int, noise: float = 0.0) -> Oracle:
    """Into one network of its bank, or one member where it has none: what is left where randomness is taken away."""
    network = pool.source(store.resolve(name), "cpu").open(number)
    return Oracle(lambda images: softmax(network.session.logits(images), network.temperature), noise, repeats=not noise)


def answered(ensemble: Ensemble, mode: Mode, images: NDArray[np.float32]) -> Array:
    """What the policy shows of the answers: (batch, classes)."""
    rows, session = ensemble.rows(mode, images), ensemble.sessions[mode]
    outputs = session.joined([session.run(task, rows) for task in range(session.tasks(len(rows)))])
    probs = session.settle(rows, outputs).prediction.mean_probs
    digits = ensemble.policy.digits(mode)
    return probs if digits == "exact" else probs.round(int(digits))


def over_http(url: str, name: str, mode: Mode) -> Oracle:
    """The same into a running service."""
    client = httpx.Client(timeout=60)

    def ask(images: NDArray[np.float32]) -> Array:
        fields = {"inputs": images.tolist(), "ensemble": name, "mode": mode}
        answer = client.post(url, json=fields)
        answer.raise_for_status()
        return np.array([row["probs"] for row in answer.json()["predictions"]])

    return Oracle(ask, repeats=mode != "random")
