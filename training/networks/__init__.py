"""Networks by name. A network is a plain nn.Module that takes normalised inputs (batch, *shape) and returns logits.

mlp                      networks/mlp.py           any input but tokens
cnn1d, lstm              networks/signals.py       signals: (channels, length), (steps, features)
transformer              networks/transformer.py   texts: token ids (length,)
vgg16, vgg16-bn          networks/vgg.py
preresnetN               networks/preresnet.py     N = 6n+2 (basic) or 9n+2 (bottleneck, from 110)
wrn-D-K                  networks/wide_resnet.py   depth D = 6n+4, width factor K
torchvision:NAME         any classifier of torchvision        networks/libraries.py; the next two, too
timm:NAME                any classifier of timm
transformers:PATH        a classifier of transformers in a local folder, with its weights if they are there
package.module:factory   a user's factory(num_classes, input_shape, **options) -> nn.Module; for texts it also gets `vocabulary`, the
                         number of token ids; for several named tensors input_shape is a dict, and forward is called by name
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models_store.inputs import kinds
from models_store.manifest import InputSpec
from training.data.import_string import import_string
from training.errors import NetworkError
from training.networks import by_name, libraries, mlp, preresnet, signals, transformer, vgg, wide_resnet

Shape = tuple[int, ...]
SPELT = {"mlp": mlp.make, "cnn1d": signals.cnn1d, "lstm": signals.lstm, "transformer": transformer.make}
Factory = Callable[..., nn.Module]


def find(spec: str) -> Factory:
    """Returns the factory of a network by name.

    Raises:
        NetworkError: the name is unknown, or its family does not have this depth.
        ImportStringError: the import string cannot be imported.
    """
    library, _, name = spec.partition(":")
    if library in libraries.FACTORIES:
        return libraries.FACTORIES[library](name)
    if ":" in spec:
        return import_string(spec)
    if spec in SPELT:
        return SPELT[spec]
    if spec in ("vgg16", "vgg16-bn"):
        return lambda *args, **kwargs: vgg.make(*args, batch_norm=spec.endswith("bn"), **kwargs)
    if match := re.fullmatch(r"preresnet(\d+)", spec):
        return lambda *args, **kwargs: preresnet.make(*args, depth=int(match[1]), **kwargs)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", spec):
        return lambda *args, **kwargs: wide_resnet.make(*args, depth=int(match[1]), widen=int(match[2]), **kwargs)
    raise NetworkError(
        f"Unknown network {spec!r}. Known: {', '.join(SPELT)}, vgg16, vgg16-bn, preresnetN (e.g. preresnet20), wrn-D-K (e.g. "
        "wrn-28-10), torchvision:NAME, timm:NAME, transformers:PATH, or your own as package.module:factory."
    )


def build(spec: str, num_classes: int, takes: InputSpec | Shape, options: dict[str, Any]) -> nn.Module:
    """Build a network and check that it returns logits.

    Args:
        spec: its name.
        num_classes: number of classes.
        takes: what it takes; a shape (C, H, W) stands for images.
        options: further arguments of its factory.

    Raises:
        NetworkError: it cannot be built with these arguments, or its output is not (batch, num_classes).
    """
    factory = find(spec)
    given = takes if isinstance(takes, InputSpec) else InputSpec(shape=takes)
    input_shape, noun = given.shape, f"{given.kind}s" if given.kind == "image" else given.kind
    if given.kind == "tokens" and _takes_vocabulary(factory):
        options = {"vocabulary": given.vocabulary, **options}
    try:
        if by_name.wanted(given) and spec != "mlp":  # which takes all features as one vector
            inner = factory(num_classes, by_name.shapes(given), **options)
            network = by_name.ByName(inner, given) if isinstance(inner, nn.Module) else inner
        else:
            network = factory(num_classes, input_shape, **options)
    except NetworkError:
        raise
    except Exception as error:
        raise NetworkError(
            f"Network {spec!r} cannot be built for {num_classes} classes and {noun} {input_shape} with {options or 'no options'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise NetworkError(f"The factory {spec!r} returned {type(network).__name__}; it must return an nn.Module.")
    random_state = torch.get_rng_state()
    try:
        with torch.no_grad():
            logits = network.eval()(torch.from_numpy(kinds.blank(given)).repeat(2, *([1] * len(input_shape))))
    except Exception as error:
        raise NetworkError(
            f"Network {spec!r} does not run on {noun} {input_shape}: {type(error).__name__}: {error}. It may need {_ADVICE[given.kind]}."
        ) from error
    torch.set_rng_state(random_state)
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise NetworkError(f"Network {spec!r} answers 2 {noun} with {shape}; it must give logits (2, {num_classes}).")
    return network.train()


_ADVICE = {
    "image": "larger images or another number of channels",
    "features": "another shape; mlp takes any features, cnn1d and lstm take signals of two axes",
    "tokens": "to be made for token ids, as transformer is",
}


def _takes_vocabulary(factory: Factory) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False
    return "vocabulary" in parameters
