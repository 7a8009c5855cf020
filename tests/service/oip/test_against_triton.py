"""What a client library does is the same against this service and a real Triton that serves the same ONNX files.

`make .venv-triton/.installed` installs it, where Debian's Python 3.11.2 is there; elsewhere this is skipped.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.onnx_members import SHAPE, publish
from tests.service.conftest import ROOT, Server, free_port

pytest.importorskip("tritonclient")
pytest.importorskip("grpc_health")
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

TRITON = Path(sys.prefix).parent / ".venv-triton/bin/python"
pytestmark = pytest.mark.skipif(not TRITON.exists(), reason="Triton is not installed: make .venv-triton/.installed")
IMAGES = np.random.default_rng(0).random((3, *SHAPE), np.float32)
LIBRARIES = {"http": triton_http, "grpc": triton_grpc}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Where each server answers, by server and protocol."""
    from models_store.store import Store

    folder = tmp_path_factory.mktemp("triton")
    store = Store(folder / "store")
    version = publish(store, "images")
    port, theirs, their_grpc = free_port(), free_port(), free_port()
    with (folder / "triton.log").open("w") as log:
        triton = subprocess.Popen(
            [TRITON, "-m", "benchmarks.peers.triton_ensemble"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env={
                **os.environ, "MEMBERS": str(version.folder / "members"), "PORT": str(theirs), "GRPC_PORT": str(their_grpc),
                "NAME": "images", "SHAPE": ",".join(map(str, SHAPE)), "CLASSES": str(len(version.manifest.classes)),
            },
        )  # fmt: skip
    server = Server(store, folder, MODEPATH_GRPC_PORT=str(port))
    try:
        server.until(200)
        where = {
            "ours": {"http": server.url.removeprefix("http://"), "grpc": f"127.0.0.1:{port}"},
            "theirs": {"http": f"127.0.0.1:{theirs}", "grpc": f"127.0.0.1:{their_grpc}"},
        }
        with triton_http.InferenceServerClient(where["theirs"]["http"]) as client:
            for _ in range(600):
                try:
                    if client.is_model_ready("images"):
                        break
                except Exception:
                    assert triton.poll() is None, (folder / "triton.log").read_text()
                time.sleep(0.1)
            else:
                raise AssertionError((folder / "triton.log").read_text())
        yield where
    finally:
        server.stop()
        if triton.poll() is None:
            os.killpg(triton.pid, signal.SIGINT)
        try:
            triton.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(triton.pid, signal.SIGKILL)
            triton.wait()


def outcome(ask):
    """What the client returns, or the status of the exception that it raises."""
    try:
        return ask()
    except InferenceServerException as error:
        return "refused", str(error.status())


def given(library, name="input", values=IMAGES, datatype="FP32", **options):
    made = library.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, **options)
    return [made]


def infer(client, library, inputs, model="images", version="", **options):
    answer = client.infer(model, inputs, version, outputs=[library.InferRequestedOutput("probs")], **options)
    response = answer.get_response(as_json=True) if library is triton_grpc else answer.get_response()
    output = next(one for one in response["outputs"] if one["name"] == "probs")
    found = answer.as_numpy("probs")
    return (
        response["model_name"], response["model_version"], response.get("id", ""), output["datatype"],
        [int(axis) for axis in output["shape"]], str(found.dtype), found.round(5).tolist(),
    )  # fmt: skip


def described(client, library):
    found = client.get_model_metadata("images", **({"as_json": True} if library is triton_grpc else {}))
    inputs = [(one["name"], one["datatype"], [int(axis) for axis in one["shape"]]) for one in found["inputs"]]
    probs = next(one for one in found["outputs"] if one["name"] == "probs")
    return found["name"], found["versions"], inputs, probs["datatype"], [int(axis) for axis in probs["shape"]]


CALLS = {
    "the server is live": lambda c, lib: c.is_server_live(),
    "the server is ready": lambda c, lib: c.is_server_ready(),
    "the model is ready": lambda c, lib: c.is_model_ready("images"),
    "its version is ready": lambda c, lib: c.is_model_ready("images", "1"),
    "another version is not": lambda c, lib: c.is_model_ready("images", "9"),
    "another model is not": lambda c, lib: c.is_model_ready("nothing"),
    "metadata": described,
    "metadata of another model": lambda c, lib: c.get_model_metadata("nothing"),
    "infer": lambda c, lib: infer(c, lib, given(lib)),
    "infer one row": lambda c, lib: infer(c, lib, given(lib, values=IMAGES[:1])),
    "infer by version": lambda c, lib: infer(c, lib, given(lib), version="1"),
    "infer with an id": lambda c, lib: infer(c, lib, given(lib), request_id="mine"),
    "wrong model": lambda c, lib: infer(c, lib, given(lib), model="nothing"),
    "wrong version": lambda c, lib: infer(c, lib, given(lib), version="9"),
    "wrong input": lambda c, lib: infer(c, lib, given(lib, name="pixels")),
    "wrong shape": lambda c, lib: infer(c, lib, given(lib, values=IMAGES[:, :, :1])),
    "without a batch axis": lambda c, lib: infer(c, lib, given(lib, values=IMAGES[0])),
    "wrong datatype": lambda c, lib: infer(c, lib, given(lib, values=IMAGES.astype(np.float64), datatype="FP64")),
    "texts for numbers": lambda c, lib: infer(c, lib, given(lib, values=np.array([[b"a"]], object), datatype="BYTES")),
    "input twice": lambda c, lib: infer(c, lib, given(lib) + given(lib)),
    "wrong output": lambda c, lib: c.infer("images", given(lib), outputs=[lib.InferRequestedOutput("nothing")]),
}


@pytest.mark.parametrize("protocol", LIBRARIES)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_has_the_same_outcome(both, protocol, call):
    library = LIBRARIES[protocol]
    found = {}
    for server, where in both.items():
        with library.InferenceServerClient(where[protocol]) as client:
            found[server] = outcome(lambda client=client: CALLS[call](client, library))
    assert found["ours"] == found["theirs"]


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_binary_data_and_json_have_the_same_outcome(both, sent, wanted):
    found = {}
    for server, where in both.items():
        with triton_http.InferenceServerClient(where["http"]) as client:
            outputs = [triton_http.InferRequestedOutput("probs", binary_data=wanted)]
            answer = client.infer("images", given(triton_http, binary_data=sent), outputs=outputs)
            output = answer.get_output("probs")
            found[server] = (
                answer.as_numpy("probs").round(5).tolist(), output["shape"], output["datatype"], sorted(output), output.get("parameters"),
            )  # fmt: skip
    assert found["ours"] == found["theirs"]
