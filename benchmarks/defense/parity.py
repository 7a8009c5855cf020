"""Is the oracle in this process the running service's own? An attack through HTTP, on a store of its own, whose every question is asked here too."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.defense import arms, blackbox
from benchmarks.serving import throughput
from models_store.store import Store, Version
from models_store.uncertainty import softmax
from service.inference.modes import pool

AWAY = 1e-5  # of probabilities: in another batch, another rounding
NEVER = 1e12  # seconds, after which the key turns


def over_http(version: Version, images: np.ndarray, labels: np.ndarray, epsilon: float, budget: int) -> dict[str, Any]:
    """Square against `keyed`, whose key both know, and each of its questions through the other oracle; then answers of `random` beside those of the network that each names.

    Answers are compared and not what Square makes of them: where a network is sure, its climb turns on the last bit.
    """
    name = version.manifest.name
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(version.folder, Path(folder) / name / version.folder.name)
        store = Store(Path(folder))
        store.activate(name, version.manifest.version)
        policy = json.dumps({name: {"modes": ["random", "keyed"], "probabilities": "exact", "point": True}})
        environment = {
            "MODELS_STORE": folder,
            "MODEPATH_POLICIES": policy,
            "MODEPATH_KEY": arms.SECRET.decode(),
            "MODEPATH_KEY_SECONDS": str(NEVER),
        }
        command = ["bentoml", "serve", "--port", "{port}"]
        with throughput.running(throughput.Arm("modepath", command, environment)) as (url, _):
            throughput.until_ready(url)
            served, here = arms.over_http(url, name, "keyed"), arms.oracle(store, version.name, "keyed")
            asked: list[tuple[np.ndarray, np.ndarray]] = []
            over = served.ask_images

            def recorded(some: np.ndarray) -> np.ndarray:
                answers = over(some)
                asked.append((some, answers))
                return answers

            served.ask_images = recorded
            blackbox.square(served, images, labels, epsilon, budget, 1)
            keyed_away = max(float(np.abs(here.ask(some) - answers).max()) for some, answers in asked)
            fields = {"inputs": images.tolist(), "ensemble": name, "mode": "random"}
            rows = httpx.post(url, json=fields, timeout=60).raise_for_status().json()["predictions"]
        source, away = pool.source(store.resolve(version.name), "cpu"), 0.0
        for image, row in zip(images, rows, strict=True):
            network = source.open(row["point"])
            alone = softmax(network.session.logits(image[None]), network.temperature)[0]
            away = max(away, float(np.abs(alone - row["probs"]).max()))
    return {
        "images": len(images),
        "budget": budget,
        "answers": served.answers,
        "keyed_away": keyed_away,
        "random_away": away,
        "points": len({row["point"] for row in rows}),
    }


def check(found: dict[str, Any]) -> None:
    """Go on only where both oracles are the same.

    Raises:
        SystemExit: they are not.
    """
    if max(found["keyed_away"], found["random_away"]) > AWAY:
        raise SystemExit(f"the running service answers otherwise than the oracle that is attacked: {told(found)}")


def told(found: dict[str, Any]) -> str:
    """For people."""
    return (
        f"Square against `keyed` over HTTP, {found['images']} images, {found['answers']} answers: those of the oracle in process to the same questions differ by at most "
        f"{found['keyed_away']:.1g}. {found['images']} answers of `random` over HTTP came from {found['points']} points and differ from those points' own by at most "
        f"{found['random_away']:.1g}."
    )
