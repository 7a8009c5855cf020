"""No command sends telemetry."""

import pytest

from models_store.store import Store
from tests.onnx_members import publish
from tests.recording_proxy import recording_proxy

TRAINING = ("training.independent", "--dataset", "digits", "--network", "mlp", "--epochs", "1")


@pytest.mark.parametrize(
    "arguments", [("models_store", "list"), ("models_store", "verify"), TRAINING], ids=lambda a: a[0]
)
def test_a_command_contacts_nobody_and_leaves_no_number_of_this_machine(command, tmp_path, monkeypatch, arguments):
    if arguments[0].startswith("training"):
        pytest.importorskip("torch", reason="the training extra is not installed")
    for name in ("BENTOML_DO_NOT_TRACK", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    publish(Store(), "animals")
    home = tmp_path / "home"
    home.mkdir()
    with recording_proxy(home) as (environment, attempts):
        done = command(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        assert not attempts
    assert not list(home.rglob("*nnxruntime*"))
