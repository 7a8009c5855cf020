"""The command `modepath`, run in the user's own folder."""

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from models_store.store import Store
from tests.modepath.test_api import LAYOUTS, THEIRS, folder, run  # noqa: F401
from tests.onnx_members import publish
from tests.service.conftest import free_port

MODEPATH = (sys.executable, "-m", "modepath")


@pytest.fixture
def pictures(folder):  # noqa: F811
    publish(Store(folder / "store"), "animals", shape=(1, 4, 4))
    (folder / "pictures").mkdir()
    for number in range(3):
        pixels = np.full((4, 4), 80 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    return folder


def test_files_are_answered_in_a_table(pictures):
    done = run(pictures, *MODEPATH, "predict", "animals", "pictures")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["file"] for row in rows] == [f"pictures/{number}.png" for number in range(3)]
    for row in rows:
        probs = [float(value) for name, value in row.items() if name.startswith("probability of ")]
        assert sum(probs) == pytest.approx(1)
        assert float(row["confidence"]) == pytest.approx(max(probs))
    done = run(pictures, *MODEPATH, "predict", "animals", "pictures/0.png", "pictures/2.png", "--csv", "out.csv")
    assert done.returncode == 0, done.stderr
    assert len((pictures / "out.csv").read_text().splitlines()) == 3


def test_what_it_cannot_answer_is_one_line_and_exit_code_2(pictures):
    (pictures / "text.png").write_text("no image")
    for arguments, said in (
        (("nobody", "pictures"), "Nothing"),
        (("animals", "text.png"), "text.png"),
        (("animals", "missing.png"), "missing.png"),
    ):
        done = run(pictures, *MODEPATH, "predict", *arguments)
        assert done.returncode == 2, done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert said in line or arguments[0] in line


def test_it_lists_the_store_and_its_commands_from_any_folder(pictures):
    assert "animals" in run(pictures, *MODEPATH, "store", "list").stdout
    text = run(pictures, *MODEPATH, "--help").stdout
    assert all(command in text for command in ("fge", "soup", "evaluate", "serve", "predict", "store"))
    completion = run(pictures, *MODEPATH, "--print-completion", "bash")
    assert "espro" in completion.stdout


@pytest.mark.parametrize("names", LAYOUTS)
def test_it_trains_beside_modules_of_the_user_with_the_names_of_ours(folder, names):  # noqa: F811
    pytest.importorskip("torch", reason="the training extra is not installed")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(THEIRS[name])
    (folder / names[0]).write_text(
        "from torch import nn\n"
        "def make(num_classes, input_shape): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    network = f"{names[0]}:make"
    done = run(
        folder, *MODEPATH, "independent", "--network", network, "--runs", "1", "--epochs", "1", "--name", "x", "--activate-anyway",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "published x@1" in done.stdout


def test_it_serves_from_any_folder_beside_a_module_called_service(pictures):
    pytest.importorskip("bentoml", reason="the service extra is not installed")
    (pictures / "service.py").write_text("raise RuntimeError('not this one')")
    port = free_port()
    environment = {**os.environ, "MODELS_STORE": "store", "BENTOML_HOME": str(pictures / "home")}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen([*MODEPATH, "serve", "--port", str(port)], cwd=pictures, env=environment)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"http://127.0.0.1:{port}/ensembles")
                if answer.json().get("ensembles"):
                    break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert [one["name"] for one in answer.json()["ensembles"]] == ["animals"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
