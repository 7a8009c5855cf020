"""Options shared by all methods. A method's Config adds its own."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from training.data import DataOptions
from training.errors import ConfigError

T = TypeVar("T")


def later(default: T) -> T:
    """A field added to a released command. At its default it is left out of the hash of the run, so that older runs can be resumed."""
    return dataclasses.field(default=default, metadata={"later": True})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options shared by all methods. The same options again resume a run, or find it finished."""

    method: ClassVar[str]
    # Options that do not change the result; they are left out of the hash of the run.
    INCIDENTAL: ClassVar[frozenset[str]] = frozenset({"log", "fresh", "activate", "activate_anyway", "workers"})

    name: str | None = None
    """Name to publish the ensemble under (default: DATASET-METHOD)."""
    dataset: str = "digits"
    """Data set: digits, fashion-mnist, cifar10, cifar100, imagefolder:PATH, package.module:factory or path/to/file.py:factory."""
    network: str = "preresnet8"
    """Network: mlp, vgg16, vgg16-bn, preresnetN, wrn-D-K, torchvision:NAME, package.module:factory or path/to/file.py:factory."""
    network_options: tuple[str, ...] = ()
    """Arguments passed to the network's factory, for example width=0.5 bottleneck=True."""
    epochs: int = 40
    """Budget of one run, in epochs over the training split."""
    runs: int = 1
    """Number of independent runs, each from new initial weights and each with the whole budget."""
    seed: int = 0
    """Seed of the initial weights, the order of images, augmentation and dropout. A run on a CPU is reproducible to the bit."""

    batch_size: int = 128
    """Number of images per step, over all devices together."""
    lr: float = 0.1
    """Initial learning rate of the plain schedule: constant to half of the budget, then linear to 1 % at 0.9 of it, then constant."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov's momentum."""
    weight_decay: float = 3e-4
    """Factor of the L2 penalty on all parameters."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, from 0 to 1."""
    loss: str | None = None
    """Loss that replaces the cross-entropy: package.module:function of (logits, labels), which returns a scalar."""
    adversarial_epsilon: float = later(0.0)
    """Adversarial training: the network is trained on the worst images within this distance of each pixel, in [0, 1]. 0 switches it off."""
    adversarial_steps: int = later(7)
    """Steps of the search for adversarial images. Each costs one forward and one backward pass."""
    adversarial_share: float = later(1.0)
    """Share of each batch that is replaced by adversarial images."""

    validation: float = 0.1
    """Share of the training images set aside for validation if the data set has no validation split."""
    split_seed: int = 0
    """Seed of the choice of the images set aside for validation."""
    limit: int | None = None
    """Train on this many images only."""
    augment: Literal["auto", "none", "crop", "flip", "crop-flip"] = "auto"
    """Random crop and flip of training images; auto uses what suits the data set."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, in [0, 1], used to normalise images (default: measured on the training split). Give it with --init if the network was trained elsewhere."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, used to normalise images (default: measured on the training split)."""
    image_size: int | None = None
    """Side length of the images of an imagefolder, in pixels (default: 224)."""
    in_memory: Literal["auto", "yes", "no"] = "auto"
    """Keep the data set in memory (on the GPU if it takes at most half of it); auto does so if it fits and is not random by itself."""
    memory_gib: float = 4.0
    """Memory that a split may take if --in-memory is auto, in GiB."""
    workers: int = 0
    """Number of processes that read a streamed data set."""
    bn_images: int = 8192
    """Number of training images, without augmentation, on which batch-norm statistics are re-estimated for each member."""
    keep_all_members: bool = later(False)
    """Average every member. Otherwise members that are far worse on validation than most are left out and named."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    devices: int = 1
    """Number of devices to train on, with data parallelism."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """Precision of training: bf16 is autocast with float32 weights; auto uses it if the hardware computes in it. Published members are float32."""
    channels_last: bool = True
    """Lay convolutions out with channels last, which is faster on most hardware."""
    compile: bool = False
    """Compile the network with torch.compile (on a CPU this needs a C++ compiler)."""

    log: Literal["none", "csv", "tensorboard"] = "none"
    """Also write rate, losses and scores, an epoch a row, into the run's folder."""
    fresh: bool = False
    """Forget an earlier run of these options and train anew."""
    activate: bool = True
    """Serve the new version at once, unless it is worse on validation than the given network, the active version or chance."""
    activate_anyway: bool = False
    """Serve it even then."""

    def __post_init__(self) -> None:
        positive = {"epochs", "runs", "batch_size", "lr", "bn_images", "devices", "memory_gib"}
        for key in positive:
            if getattr(self, key) <= 0:
                raise ConfigError(f"--{key.replace('_', '-')} must be positive; got {getattr(self, key)}.")
        if self.activate_anyway and not self.activate:
            raise ConfigError("--activate-anyway and --no-activate contradict each other; give one of them.")
        if self.seed < 0 or self.split_seed < 0:
            raise ConfigError("--seed and --split-seed must not be negative.")
        for key in ("momentum", "weight_decay", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"--{key.replace('_', '-')} must lie in [0, 1); got {getattr(self, key)}.")
        if not 0 <= self.adversarial_epsilon < 1 or self.adversarial_steps < 1 or not 0 < self.adversarial_share <= 1:
            raise ConfigError(
                "--adversarial-epsilon lies in [0, 1), --adversarial-steps is at least 1, --adversarial-share lies in (0, 1]."
            )
        if self.nesterov and self.momentum == 0:
            raise ConfigError("--nesterov needs --momentum above 0.")
        if self.loss is not None and self.label_smoothing:
            raise ConfigError(
                "--label-smoothing belongs to the cross-entropy; a --loss of your own does its own smoothing."
            )

    @property
    def published_name(self) -> str:
        """The name that is published."""
        return self.name or f"{self.dataset.split(':')[-1].rsplit('/', 1)[-1]}-{self.method}"

    def given(self) -> tuple[str, ...]:
        """Weights that the run begins from: checkpoint files, or members of published ensembles."""
        return ()

    def beginning_from(self, given: Sequence[str]) -> Self:
        """The same options with these in place of `given()`."""
        return self

    def initial_networks(self) -> int:
        """How many networks with initial weights of their own the run needs."""
        return 0 if self.given() else self.runs

    def deciding(self) -> dict[str, Any]:
        """What decides the result, as JSON: it names the run and is kept as provenance."""
        fields = [field for field in dataclasses.fields(self) if field.name not in self.INCIDENTAL]
        record = {
            f.name: getattr(self, f.name)
            for f in fields
            if not f.metadata.get("later") or getattr(self, f.name) != f.default
        }
        return {key: _plain(value) for key, value in record.items()}

    @property
    def passes(self) -> float:
        """Forward and backward passes of a step, in units of a plain one."""
        return 1 + self.adversarial_steps * self.adversarial_share if self.adversarial_epsilon else 1.0

    def data_options(self) -> DataOptions:
        """The part that data.load reads."""
        return data_options({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    def network_kwargs(self) -> dict[str, Any]:
        """--network-options as keyword arguments: Python literals, else strings.

        Raises:
            ConfigError: not key=value.
        """
        kwargs: dict[str, Any] = {}
        for option in self.network_options:
            key, equals, value = option.partition("=")
            if not equals or not key.isidentifier():
                raise ConfigError(f"--network-options are key=value, as width=0.5; got {option!r}.")
            try:
                kwargs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                kwargs[key] = value
        return kwargs


def data_options(record: dict[str, Any]) -> DataOptions:
    """DataOptions from a configuration, or from the one that a manifest keeps."""
    known = {f.name for f in dataclasses.fields(DataOptions)}
    chosen: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items() if key in known}
    return DataOptions(**chosen)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
