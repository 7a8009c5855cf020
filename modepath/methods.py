"""Training and evaluation with modules and data sets as objects. Calling one of these functions imports torch.

Each training function publishes its result to the store ($MODELS_STORE). Repeating a call resumes an interrupted run,
or returns the result of a finished one.

`network` is a function make(num_classes, input_shape) -> nn.Module, a module (its weights are re-initialised for each
network), or a name such as "preresnet8" or "torchvision:resnet18". `data` is (train, validation, test), each a data set
of pairs (image, label) or (images, labels); a function that returns them; or a name such as "digits" or
"imagefolder:photos".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from models_store.store import Store
from modepath import objects
from modepath import options as options_
from modepath.ensemble import Ensemble, of_version
from modepath.own import own_packages

if TYPE_CHECKING:
    from training.measurement.report import Report

Loss = str | Callable[..., Any] | None


def fge(*, network: Any, data: Any, name: str, loss: Loss = None, **options: Unpack[options_.FgeOptions]) -> Ensemble:
    """Fast geometric ensembling: several networks within one training budget (Garipov et al. 2018).

    Args:
        network: a function make(num_classes, input_shape), a module, or a name.
        data: (train, validation, test), a function that returns them, or a name.
        name: name to publish under.
        loss: function of (logits, labels) that replaces the cross-entropy, or its import string.
        options: options of `python -m training.fge --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    return _train("fge", network, data, name, loss, options)


def independent(
    *, network: Any, data: Any, name: str, loss: Loss = None, **options: Unpack[options_.IndependentOptions]
) -> Ensemble:
    """A deep ensemble: networks trained independently (Lakshminarayanan et al. 2017).

    Args:
        network: a function make(num_classes, input_shape), a module, or a name.
        data: (train, validation, test), a function that returns them, or a name.
        name: name to publish under.
        loss: function of (logits, labels) that replaces the cross-entropy, or its import string.
        options: options of `python -m training.independent --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    return _train("independent", network, data, name, loss, options)


def snapshot(
    *, network: Any, data: Any, name: str, loss: Loss = None, **options: Unpack[options_.SnapshotOptions]
) -> Ensemble:
    """Snapshot ensembles: a member at the end of each cosine cycle (Huang et al. 2017).

    Args:
        network: a function make(num_classes, input_shape), a module, or a name.
        data: (train, validation, test), a function that returns them, or a name.
        name: name to publish under.
        loss: function of (logits, labels) that replaces the cross-entropy, or its import string.
        options: options of `python -m training.snapshot --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    return _train("snapshot", network, data, name, loss, options)


def curve(
    *, network: Any, data: Any, name: str, loss: Loss = None, **options: Unpack[options_.CurveOptions]
) -> Ensemble:
    """A low-loss curve between two networks, and networks along it (Garipov et al. 2018).

    Args:
        network: a function make(num_classes, input_shape), a module, or a name.
        data: (train, validation, test), a function that returns them, or a name.
        name: name to publish under.
        loss: function of (logits, labels) that replaces the cross-entropy, or its import string.
        options: options of `python -m training.curve --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    return _train("curve", network, data, name, loss, options)


def espro(
    *, network: Any, data: Any, name: str, loss: Loss = None, **options: Unpack[options_.EsproOptions]
) -> Ensemble:
    """Low-loss simplexes around networks, and networks sampled from them (Benton et al. 2021).

    Args:
        network: a function make(num_classes, input_shape), a module, or a name.
        data: (train, validation, test), a function that returns them, or a name.
        name: name to publish under.
        loss: function of (logits, labels) that replaces the cross-entropy, or its import string.
        options: options of `python -m training.espro --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    return _train("espro", network, data, name, loss, options)


def swag(*, network: Any, data: Any, name: str, loss: Loss = None, **options: Unpack[options_.SwagOptions]) -> Ensemble:
    """A Gaussian fitted to the weights of a training run, and networks sampled from it (Maddox et al. 2019).

    Args:
        network: a function make(num_classes, input_shape), a module, or a name.
        data: (train, validation, test), a function that returns them, or a name.
        name: name to publish under.
        loss: function of (logits, labels) that replaces the cross-entropy, or its import string.
        options: options of `python -m training.swag --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    return _train("swag", network, data, name, loss, options)


def csgmcmc(
    *, network: Any, data: Any, name: str, loss: Loss = None, **options: Unpack[options_.CsgmcmcOptions]
) -> Ensemble:
    """Cyclical stochastic gradient MCMC: samples of the posterior in each cycle (Zhang et al. 2020).

    Args:
        network: a function make(num_classes, input_shape), a module, or a name.
        data: (train, validation, test), a function that returns them, or a name.
        name: name to publish under.
        loss: function of (logits, labels) that replaces the cross-entropy, or its import string.
        options: options of `python -m training.csgmcmc --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    return _train("csgmcmc", network, data, name, loss, options)


def soup(*, network: Any, data: Any, name: str, loss: Loss = None, **options: Unpack[options_.SoupOptions]) -> Ensemble:
    """A greedy soup: one network whose weights are a greedily chosen average (Wortsman et al. 2022).

    Args:
        network: a function make(num_classes, input_shape), a module, or a name.
        data: (train, validation, test), a function that returns them, or a name.
        name: name to publish under.
        loss: function of (logits, labels) that replaces the cross-entropy, or its import string.
        options: options of `python -m training.soup --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    return _train("soup", network, data, name, loss, options)


def evaluate(name: str, *, data: Any = None, **options: Any) -> Report:
    """Measure a published ensemble: scores, error detection, calibration. Logs and saves the report that it returns.

    The result is a dict of the numbers; its `figures` are matplotlib figures by name: a reliability diagram and a confusion matrix.

    Args:
        name: NAME or NAME@VERSION.
        data: the images to measure on: a data set of pairs, (images, labels), or the name of a data set, whose test
            split is used. Default: the test split of the data that the ensemble was trained on.
        options: options of `python -m training.evaluate --help`.

    Raises:
        ModepathError: the message says what was wrong, the likely cause, and what to do.
    """
    with own_packages():
        command = importlib.import_module("training.evaluate")
        dataset = data
        if data is not None and not isinstance(data, str):
            classes = Store().resolve(name).manifest.classes
            dataset = objects.data_name({"train": data, "validation": data, "test": data, "classes": classes}, "test")
        importlib.import_module("training.command").show_log()
        if isinstance(foreign := options.get("ood"), str):
            options["ood"] = (foreign,)
        return command.run(command.Config(name=name, dataset=dataset, **options))


def _train(method: str, network: Any, data: Any, name: str, loss: Loss, options: Any) -> Ensemble:
    with own_packages():
        command = importlib.import_module(f"training.{method}")
        importlib.import_module("training.command").show_log()
        given = dict(options)
        if "init" in given:
            given["init"] = _files(given["init"], several=method != "soup")
        config = command.Config(
            name=name,
            network=objects.network_name(network),
            dataset=objects.data_name(data),
            loss=objects.loss_name(loss),
            **given,
        )
        return of_version(command.run(config))


def _files(init: Any, *, several: bool) -> Path | tuple[Path, ...] | None:
    if not several:
        return None if init is None else objects.weights_file(init)
    if isinstance(init, list | tuple):
        return tuple(objects.weights_file(one) for one in init)
    return (objects.weights_file(init),)
