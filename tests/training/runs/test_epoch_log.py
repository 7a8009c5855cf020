import builtins

import pytest

from training.errors import ConfigError
from training.runs.epoch_log import epoch_log

OPTIONS = {"lr": 0.1, "dataset": "digits"}


def test_mlflow_gets_options_and_epochs_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the dev extra is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "tracked").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    epoch_log("mlflow", tmp_path, "abc", OPTIONS)({"train_loss": 2.0}, 1)
    epoch_log("mlflow", tmp_path, "abc", OPTIONS)({"train_loss": 1.0}, 2)  # another session
    epoch_log("mlflow", tmp_path, "other", OPTIONS)({"train_loss": 5.0}, 1)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("modepath")
    runs = client.search_runs([experiment.experiment_id], "tags.`modepath.run` = 'abc'")
    assert [run.data.params for run in runs] == [{"lr": "0.1", "dataset": "digits"}]
    history = client.get_metric_history(runs[0].info.run_id, "train_loss")
    assert [(one.step, one.value) for one in history] == [(1, 2.0), (2, 1.0)]


def test_wandb_keeps_a_run_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the dev extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    epoch_log("wandb", tmp_path, "abc", OPTIONS)({"train_loss": 2.0}, 1)
    assert dict(wandb.run.config) == OPTIONS
    assert wandb.run.summary["train_loss"] == 2.0
    wandb.finish()
    [file] = tmp_path.rglob("run-abc.wandb")
    assert b"train_loss" in file.read_bytes()


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_told_with_what_to_install(tmp_path, monkeypatch, kind):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name == kind:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=f"--log {kind} needs the package {kind}: pip install {kind}"):
        epoch_log(kind, tmp_path, "abc", OPTIONS)
