"""The options of each method, for editors and type checkers. A test compares them with the options of the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

Weights = str | Path | Mapping[str, Any]  # a file, or a state dict


class Options(TypedDict, total=False):
    """Options that all methods share: those of `python -m training.METHOD --help`."""

    network_options: tuple[str, ...]
    epochs: int
    runs: int
    seed: int
    train: tuple[str, ...]
    freeze: tuple[str, ...]
    reset_head: bool
    batch_size: int
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    optimizer: str
    clip_norm: float | None
    accumulate: int
    ema: float
    layer_decay: float
    warmup: float
    schedule: Literal["plain", "cosine"]
    label_smoothing: float
    class_weights: tuple[str, ...]
    draw: Literal["uniform", "balanced", "weights"]
    adversarial_epsilon: float
    adversarial_steps: int
    adversarial_share: float
    validation: float
    split_seed: int
    stratify: bool
    group: str | None
    limit: int | None
    label: str | None
    drop: tuple[str, ...]
    tokenizer: str | None
    text: str | None
    longest: int | None
    missing: Literal["refuse", "mean"]
    hold_out: tuple[str, ...]
    augment: Literal["auto", "none", "crop", "flip", "crop-flip"]
    transforms: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    image_size: int | None
    in_memory: Literal["auto", "yes", "no"]
    memory_gib: float
    workers: int
    bn_images: int
    keep_all_members: bool
    quantize: Literal["none", "int8", "bf16"]
    quantize_loss: float
    ray: str | None
    ray_cpus: float
    ray_gpus: float
    device: Literal["auto", "cpu", "cuda"]
    devices: int
    precision: Literal["auto", "32", "bf16"]
    channels_last: bool
    compile: bool
    log: Literal["none", "csv", "tensorboard", "mlflow", "wandb"]
    fresh: bool
    activate: bool
    activate_anyway: bool


class FgeOptions(Options, total=False):
    """Additional options of `python -m training.fge`."""

    pretrain: float
    alpha_1: float
    alpha_2: float
    members: int
    cycle: float | None
    starts: tuple[int, ...]
    init: Weights | Sequence[Weights]


class IndependentOptions(Options, total=False):
    """Additional options of `python -m training.independent`."""


class SnapshotOptions(Options, total=False):
    """Additional options of `python -m training.snapshot`."""

    cycles: int
    members: int | None


class CurveOptions(Options, total=False):
    """Additional options of `python -m training.curve`."""

    endpoints: tuple[str, ...]
    end_epochs: int | None
    shape: Literal["bezier", "polychain", "segment"]
    bends: int
    curve_lr: float
    points_per_step: int
    members: int
    bank: int


class EsproOptions(Options, total=False):
    """Additional options of `python -m training.espro`."""

    base: tuple[str, ...]
    vertices: int | None
    connect: tuple[str, ...]
    vertex_epochs: int
    vertex_lr: float
    points_per_step: int
    volume_weight: float
    perturbation: float
    samples: int
    bank: int


class SwagOptions(Options, total=False):
    """Additional options of `python -m training.swag`."""

    start: float
    swag_lr: float
    every: float
    rank: int
    samples: int
    init: Weights | Sequence[Weights]
    endpoints: tuple[str, ...]


class CsgmcmcOptions(Options, total=False):
    """Additional options of `python -m training.csgmcmc`."""

    cycles: int
    samples: int
    sampling: float
    posterior_temperature: float


class SoupOptions(Options, total=False):
    """Additional options of `python -m training.soup`."""

    init: Weights | None
    rates: tuple[float, ...]
    last: int
