"""From collected weights to a published version: the end of every door."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models_store import manifest
from models_store.store import Store, Version
from models_store.uncertainty import combine, softmax
from training import member, temperature
from training.config import Config
from training.data import Data, as_arrays
from training.export import Exporter
from training.metrics import score
from training.runs import Run, State, save_state

LIBRARIES = ("torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy", "lightning-fabric")
Point = tuple[State, manifest.Origin]


def publish(
    store: Store,
    config: Config,
    run: Run,
    network: nn.Module,
    data: Data,
    points: Iterable[Point],
    *,
    device: torch.device,
    described: str,
    seconds: float,
    epochs_spent: float,
    say: Callable[[str], None] = print,
) -> Version:
    """Make every point a member, calibrate their average on validation, and publish.

    Raises:
        ExportError: a member cannot be exported faithfully; then nothing is published.
        StoreError: the store cannot be written.
    """
    _, labels = as_arrays(data.validation)
    with store.staging(config.published_name) as staged:
        (staged / "members").mkdir()
        (staged / "weights").mkdir()
        exporter = Exporter(data.shape)
        origins: list[manifest.Origin] = []
        collected: list[np.ndarray] = []
        for index, (weights, origin) in enumerate(points):
            made = member.make(network, weights, data, config.bn_images, device, exporter)
            (staged / f"members/{index:03d}.onnx").write_bytes(made.onnx)
            save_state(staged / f"weights/{index:03d}.safetensors", made.state)
            origins.append(origin)
            collected.append(made.validation_logits)
        logits = np.stack(collected)  # (members, batch, classes)
        weights_of = np.full(len(logits), 1 / len(logits))
        shared = temperature.fit(logits, labels, weights_of)
        own = [temperature.fit(one[None], labels, np.ones(1)) for one in logits]
        average = score(combine(softmax(logits, shared), weights_of).mean_probs, labels)
        members = [
            manifest.Member(
                file=f"members/{index:03d}.onnx",
                weights=f"weights/{index:03d}.safetensors",
                origin=origin,
                weight=float(weights_of[index]),
                temperature=own[index],
                validation=score(softmax(logits[index], own[index]), labels),
            )
            for index, origin in enumerate(origins)
        ]
        draft = manifest.Draft(
            method=config.method,
            network=manifest.Network(factory=config.network, kwargs=config.network_kwargs()),
            input=manifest.InputSpec(shape=data.shape, resize=data.resize),
            classes=data.classes,
            members=members,
            temperature=shared,
            validation=average,
            provenance=manifest.Provenance(
                run=run.identity,
                config={"door": config.method, **config.deciding()},
                commit=_commit(),
                libraries=_libraries(),
                data_fingerprint=data.fingerprint,
                wall_seconds=round(seconds, 1),
                epochs_spent=round(epochs_spent, 4),
                device=described,
            ),
        )
        version = store.publish(config.published_name, staged, draft, activate=config.activate)
    best = max(scores.validation.accuracy for scores in members if scores.validation)
    say(
        f"published {version.name}: {len(members)} members, validation accuracy {average.accuracy:.4f} (best member {best:.4f}), "
        f"nll {average.nll:.4f}, temperature {shared:.3f}\n{version.folder}"
    )
    return version


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # installed without a checkout
    return found.stdout.strip()


def _libraries() -> dict[str, str]:
    versions: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
