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
ADAMW_SHARE = 0.01  # learning rate of AdamW, as a share of that of SGD
LogKind = Literal["none", "csv", "tensorboard", "mlflow", "wandb"]


def later(default: T) -> T:
    """A field added to a released command. Its default stays out of the run's hash, so that older runs can resume."""
    return dataclasses.field(default=default, metadata={"later": True})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options shared by all methods. The same options resume an interrupted run; a finished run is not repeated."""

    method: ClassVar[str]
    # Options that do not change the result; they are left out of the hash of the run.
    INCIDENTAL: ClassVar[frozenset[str]] = frozenset(
        {
            "log",
            "fresh",
            "activate",
            "activate_anyway",
            "workers",
            "quantize",
            "quantize_loss",
            "ray",
            "ray_cpus",
            "ray_gpus",
        }
    )

    name: str | None = None
    """Name to publish the ensemble under (default: DATASET-METHOD)."""
    dataset: str = "digits"
    """Data set. Images: digits, fashion-mnist, cifar10, cifar100, imagefolder:PATH. Tables: breast-cancer, wine, csv:PATH,
    parquet:PATH. Signals: digit-rows. Texts: languages. Any: npz:PATH, package.module:factory or
    path/to/file.py:factory."""
    network: str = "preresnet8"
    """Network. Images: vgg16, vgg16-bn, preresnetN, wrn-D-K, torchvision:NAME, timm:NAME. Signals: cnn1d, lstm. Texts:
    transformer. Images or texts: transformers:PATH. Any: mlp, package.module:factory or path/to/file.py:factory."""
    network_options: tuple[str, ...] = ()
    """Arguments passed to the network's factory, for example width=0.5 bottleneck=True."""
    epochs: int = 40
    """Budget of one run, in epochs (passes over the training split)."""
    runs: int = 1
    """Number of independent runs, each from new initial weights and each with the whole budget."""
    seed: int = 0
    """Seed of the initial weights, the order of images, augmentation and dropout. Runs on a CPU are reproducible bit
    for bit."""

    train: tuple[str, ...] = later(())
    """Names of the parameters that are trained, with * for any part, such as 'fc.*' (default: all). The others are
    frozen, with their batch norm: give the network's weights with --init."""
    freeze: tuple[str, ...] = later(())
    """Names of parameters that are frozen, with * for any part."""
    reset_head: bool = later(False)
    """Begin the last layer with new weights if that of a given checkpoint has another number of classes."""

    batch_size: int = 128
    """Number of images per training step, summed over all devices."""
    lr: float = 0.1
    """Initial learning rate of the plain schedule, which is constant for half of the budget, falls linearly to 1 % of
    this rate at 90 % of the budget, and is constant again."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov's momentum."""
    weight_decay: float = 3e-4
    """Coefficient of the L2 penalty on all parameters."""
    optimizer: str = later("sgd")
    """Optimizer: sgd, adamw, or package.module:factory, which is called with (parameters, lr=…, weight_decay=…). With
    adamw the default learning rates are a hundredth of those of SGD (a rate equal to SGD's default counts as not
    given), and weight decay is decoupled."""
    clip_norm: float | None = later(None)
    """Scale gradients so that their norm is at most this (default: never)."""
    accumulate: int = later(1)
    """Run each batch in this many parts and add up their gradients: the same step with less memory, but batch norm
    uses the statistics of each part."""
    ema: float = later(0.0)
    """Collect an exponential moving average of the weights with this decay, such as 0.99, instead of the weights
    themselves. 0: no average."""
    layer_decay: float = later(1.0)
    """Share of the learning rate that each layer has of that of the layer after it, in (0, 1]; 1: all layers alike."""
    warmup: float = later(0.0)
    """Share of the budget in which the learning rate of the plain schedule rises from 0."""
    schedule: Literal["plain", "cosine"] = later("plain")
    """The plain schedule as described at --lr, or a cosine from --lr to 0."""
    label_smoothing: float = 0.0
    """Amount of label smoothing in the cross-entropy, in [0, 1)."""
    class_weights: tuple[str, ...] = later(())
    """Weights of the classes in the cross-entropy: balanced (the inverse of the number of their training rows), or a
    number for each class. The predicted probabilities then no longer match the shares of the classes in the data."""
    draw: Literal["uniform", "balanced", "weights"] = later("uniform")
    """How the rows of an epoch are drawn. uniform: each once; balanced: with replacement, each class equally often;
    weights: with replacement, by the `weights` that the data set gives."""
    loss: str | None = None
    """Loss that replaces the cross-entropy: package.module:function or path/to/file.py:function, which is called with
    (logits, labels) and returns a scalar."""
    adversarial_epsilon: float = later(0.0)
    """Adversarial training: largest change of each pixel, for pixels in [0, 1]. The network is trained on images that
    are changed within this limit so as to raise the loss. 0: no adversarial training."""
    adversarial_steps: int = later(7)
    """Adversarial training: gradient steps that change an image. Each costs one forward and one backward pass."""
    adversarial_share: float = later(1.0)
    """Adversarial training: share of each batch that is replaced by changed images."""

    validation: float = 0.1
    """Share of the training images set aside for validation if the data set has no validation split."""
    split_seed: int = 0
    """Seed of the random choice of images that are set aside for validation."""
    stratify: bool = later(False)
    """Set the same share of each class aside for validation."""
    group: str | None = later(None)
    """Rows of one group, such as one patient, stay in one split. Data sets csv and parquet: the column that holds the
    group. imagefolder: a regular expression that finds it in the path of an image, such as 'patient(\\d+)'."""
    limit: int | None = None
    """Use only this many training images, chosen at random (default: all)."""
    label: str | None = later(None)
    """Data sets csv and parquet: the column that holds the classes (default: label)."""
    drop: tuple[str, ...] = later(())
    """Data sets csv and parquet: columns that are not used."""
    tokenizer: str | None = later(None)
    """Data sets csv and parquet: the rows are texts, which this file turns into token ids: tokenizer.json of the package
    tokenizers. It is published with the ensemble, so that requests may send texts."""
    text: str | None = later(None)
    """With --tokenizer: the column that holds the text (default: text)."""
    longest: int | None = later(None)
    """With --tokenizer: number of tokens to which longer texts are cut, in training and in serving (default: as the file
    says, or never)."""
    missing: Literal["refuse", "mean"] = later("refuse")
    """Features: refuse missing numbers (NaN), or let the network replace them by the feature's mean over the training
    rows. Tables with missing numbers use the mean."""
    hold_out: tuple[str, ...] = later(())
    """Names of classes that the network must not learn. Their test images are a near foreign set for
    `python -m training.evaluate`, which measures how many of them are detected."""
    augment: Literal["auto", "none", "crop", "flip", "crop-flip"] = "auto"
    """Random crops and flips of training images; auto uses those that suit the data set."""
    transforms: tuple[str, ...] = later(())
    """Transforms of training images after --augment: names in torchvision.transforms.v2, with arguments after a colon,
    such as RandAugment, ColorJitter:hue=0.1 or mixup:alpha=0.2. With mixup or cutmix, a --loss of your own receives
    labels as shares of the classes (batch, classes)."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, in [0, 1], used to normalise images (default: measured on the training split). Set it when
    you start from weights that were trained with another mean."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, used to normalise images (default: measured on the training split). Set it
    when you start from weights that were trained with another standard deviation."""
    image_size: int | None = None
    """Data set imagefolder: side length in pixels to which images are scaled and cropped (default: 224)."""
    in_memory: Literal["auto", "yes", "no"] = "auto"
    """Load the data set into memory, and onto the GPU if it takes at most half of the free GPU memory. auto: load it if
    each split fits into --memory-gib and returns the same images every time."""
    memory_gib: float = 4.0
    """Largest size of a split that --in-memory auto loads into memory, in GiB."""
    workers: int = 0
    """Number of processes that read a data set that is not in memory. 0: the training process reads it."""
    bn_images: int = 8192
    """Number of training images (not augmented) on which batch-norm statistics are re-estimated for each member."""
    keep_all_members: bool = later(False)
    """Average all members. By default, members that are far worse on validation than most are left out, and the log
    names them."""
    quantize: Literal["none", "int8", "bf16"] = "none"
    """Publish the members in fewer bits. int8: about a quarter of the size, and for large networks a multiple of the
    rate on a CPU; ranges are measured on training inputs. bf16: half of the size at the rate of float32. The same command
    with another value publishes the same run once more, without training. The networks of a bank stay float32."""
    quantize_loss: float = 0.01
    """With --quantize: do not publish if the validation accuracy of the average falls by more than this (0.01 is one
    percentage point), or its NLL rises by more than this many nats."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto uses the GPU if there is one."""
    devices: int = 1
    """Number of devices to train on, with data parallelism."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """Precision of training: bf16 is autocast with float32 weights; auto uses bf16 if the hardware supports it
    natively. Published members are float32 unless --quantize says otherwise."""
    channels_last: bool = True
    """Use the channels-last memory layout for convolutions, which is faster on most hardware."""
    compile: bool = False
    """Compile the network with torch.compile (on a CPU this needs a C++ compiler)."""

    ray: str | None = None
    """Train what does not depend on one another (runs, cycles of several starts, endpoints) as tasks of Ray: local, or the
    address of a cluster that this machine is a node of. Needs `pip install 'modepath[ray]'`. A node that is lost costs the
    work of one task since its last finished epoch. The result is that of a training with --ray-cpus threads, bit for bit on
    equal processors."""
    ray_cpus: float = 1
    """CPUs, and threads, of each task."""
    ray_gpus: float = 0
    """GPUs of each task, for example 0.5. 0: tasks run on CPUs."""

    log: LogKind = "none"
    """Also write the learning rate, training loss and validation scores of each epoch: csv and tensorboard to the run's
    folder, mlflow and wandb to these trackers, which read their own environment variables (MLFLOW_TRACKING_URI,
    WANDB_MODE, …) and must be installed."""
    fresh: bool = False
    """Delete an earlier run with the same options, and train from the beginning."""
    activate: bool = True
    """Serve the new version at once, unless on validation it is worse than a network that the training started from,
    worse than the active version, or no better than chance."""
    activate_anyway: bool = False
    """Serve the new version even if its validation scores speak against it (see --activate)."""

    # Options that are learning rates; with adamw their default is a hundredth of that of SGD.
    RATES: ClassVar[tuple[str, ...]] = ("lr",)
    AVERAGES: ClassVar[bool] = True  # whether --ema applies

    def __post_init__(self) -> None:
        if self.optimizer == "adamw":
            for field in dataclasses.fields(self):
                if field.name in self.RATES and (rate := getattr(self, field.name)) == field.default:
                    object.__setattr__(self, field.name, rate * ADAMW_SHARE)
        if self.ema and not self.AVERAGES:
            raise ConfigError(
                f"--ema collects an average of one network's weights; {self.method} collects others. Leave it out."
            )
        if self.accumulate < 1 or not 0 <= self.ema < 1 or not 0 < self.layer_decay <= 1 or not 0 <= self.warmup < 1:
            raise ConfigError(
                "--accumulate must be at least 1, --ema and --warmup lie in [0, 1), --layer-decay in (0, 1]."
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"--clip-norm must be positive; got {self.clip_norm}.")
        positive = {"epochs", "runs", "batch_size", "lr", "bn_images", "devices", "memory_gib"}
        for key in positive:
            if getattr(self, key) <= 0:
                raise ConfigError(f"--{key.replace('_', '-')} must be positive; got {getattr(self, key)}.")
        if self.ray and (self.devices > 1 or self.log != "none"):
            raise ConfigError("--ray has neither several --devices nor a --log; leave them out.")
        if self.ray_cpus <= 0 or self.ray_gpus < 0:
            raise ConfigError("--ray-cpus must be positive, and --ray-gpus not negative.")
        if not 0 <= self.quantize_loss <= 1:
            raise ConfigError(f"--quantize-loss must lie in [0, 1]; got {self.quantize_loss}.")
        if self.activate_anyway and not self.activate:
            raise ConfigError("--activate-anyway and --no-activate contradict each other; give one of them.")
        if self.seed < 0 or self.split_seed < 0:
            raise ConfigError("--seed and --split-seed must not be negative.")
        for key in ("momentum", "weight_decay", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"--{key.replace('_', '-')} must lie in [0, 1); got {getattr(self, key)}.")
        if not 0 <= self.adversarial_epsilon < 1 or self.adversarial_steps < 1 or not 0 < self.adversarial_share <= 1:
            raise ConfigError(
                "--adversarial-epsilon must lie in [0, 1), --adversarial-steps must be at least 1, and --adversarial-share must lie in (0, 1]."
            )
        if self.nesterov and self.momentum == 0:
            raise ConfigError("--nesterov needs --momentum above 0.")
        if self.loss is not None and self.label_smoothing:
            raise ConfigError(
                "--label-smoothing applies to the cross-entropy only; a --loss of your own must do its own smoothing."
            )
        if self.loss is not None and self.class_weights:
            raise ConfigError(
                "--class-weights applies to the cross-entropy only; a --loss of your own must weigh classes itself."
            )

    @property
    def published_name(self) -> str:
        """The name that the ensemble is published under."""
        return self.name or f"{self.dataset.split(':')[-1].rsplit('/', 1)[-1]}-{self.method}"

    def given(self) -> tuple[str, ...]:
        """References to the weights that the run starts from: checkpoint files, or members of published ensembles."""
        return ()

    def beginning_from(self, given: Sequence[str]) -> Self:
        """Returns the same options, but with these references instead of `given()`."""
        return self

    def initial_networks(self) -> int:
        """Number of networks with new initial weights that the run needs."""
        return 0 if self.given() else self.runs

    def deciding(self) -> dict[str, Any]:
        """Options that decide the result, as JSON values. Their hash names the run, and the manifest records them."""
        fields = [field for field in dataclasses.fields(self) if field.name not in self.INCIDENTAL]
        record = {
            f.name: getattr(self, f.name)
            for f in fields
            if not f.metadata.get("later") or getattr(self, f.name) != f.default
        }
        return {key: _plain(value) for key, value in record.items()}

    @property
    def passes(self) -> float:
        """Cost of a step, in units of a plain forward and backward pass."""
        return 1 + self.adversarial_steps * self.adversarial_share if self.adversarial_epsilon else 1.0

    def data_options(self) -> DataOptions:
        """The options that data.load reads."""
        return data_options({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    def network_kwargs(self) -> dict[str, Any]:
        """--network-options as keyword arguments. Values that are not Python literals are strings.

        Raises:
            ConfigError: an option does not have the form key=value.
        """
        kwargs: dict[str, Any] = {}
        for option in self.network_options:
            key, equals, value = option.partition("=")
            if not equals or not key.isidentifier():
                raise ConfigError(
                    f"--network-options must have the form key=value, for example width=0.5; got {option!r}."
                )
            try:
                kwargs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                kwargs[key] = value
        return kwargs


def data_options(record: dict[str, Any]) -> DataOptions:
    """DataOptions from a configuration, or from the one that a manifest records."""
    known = {f.name for f in dataclasses.fields(DataOptions)}
    chosen: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items() if key in known}
    return DataOptions(**chosen)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
