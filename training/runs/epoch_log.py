"""The log of a run's epochs, in a file of its folder or in an experiment tracker."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.config import LogKind
from training.errors import ConfigError

_TAG = "modepath.run"  # marks a run of MLflow
Log = Callable[[Mapping[str, float], int], None]  # values by name, number of the epoch


def epoch_log(kind: LogKind, folder: Path, identity: str, options: Mapping[str, Any]) -> Log:
    """Open the log of one run. A resumed run is continued where the tracker can do so.

    Args:
        kind: a file (csv, tensorboard) or a tracker; where a tracker sends its data is its own setting, such as
            MLFLOW_TRACKING_URI or WANDB_MODE.
        folder: the run's folder.
        identity: the run's identity, the same in all its sessions.
        options: options of the training, which a tracker records.

    Raises:
        ConfigError: the tracker is not installed.
    """
    if kind == "none":
        return lambda row, epoch: None
    if kind == "csv":
        from lightning_fabric.loggers.csv_logs import CSVLogger

        sessions = len(list((folder / "csv").glob("version_*")))
        table = CSVLogger(folder, name="csv", version=sessions, flush_logs_every_n_steps=1)
        return lambda row, epoch: table.log_metrics(dict(row), epoch)
    if kind == "tensorboard":
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        board = TensorBoardLogger(folder, name="tensorboard", version="")
        return lambda row, epoch: board.log_metrics(dict(row), epoch)
    try:
        return (_mlflow if kind == "mlflow" else _wandb)(folder, identity, options)
    except ImportError as error:
        raise ConfigError(
            f"--log {kind} needs the package {error.name}: pip install {'mlflow-skinny' if kind == 'mlflow' else kind}."
        ) from None


def _mlflow(folder: Path, identity: str, options: Mapping[str, Any]) -> Log:
    import mlflow

    # The client leaves alone what other code of this process has begun.
    client = mlflow.MlflowClient()
    chosen = os.environ.get("MLFLOW_EXPERIMENT_NAME", "modepath")
    experiment = client.get_experiment_by_name(chosen)
    number = experiment.experiment_id if experiment else client.create_experiment(chosen)
    known = client.search_runs([number], f"tags.`{_TAG}` = '{identity}'", max_results=1)
    if known:
        run = known[0].info.run_id
    else:
        run = client.create_run(number, run_name=folder.name, tags={_TAG: identity}).info.run_id
        for name, value in options.items():
            client.log_param(run, name, value)

    def log(row: Mapping[str, float], epoch: int) -> None:
        for name, value in row.items():
            client.log_metric(run, name, value, step=epoch)

    return log


def _wandb(folder: Path, identity: str, options: Mapping[str, Any]) -> Log:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "modepath")
    run = wandb.init(project=project, id=identity, name=folder.name, config=dict(options), resume="allow", dir=folder)
    return lambda row, epoch: run.log(dict(row), step=epoch, commit=True)
