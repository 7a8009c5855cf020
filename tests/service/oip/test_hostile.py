"""Requests of the Open Inference Protocol that are wrong on purpose: each is refused cheaply, and in one line."""

import json
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np
import pytest

from tests.onnx_members import SHAPE, of_features, publish
from tests.service.conftest import Server, free_port
from tests.service.oip.test_clients import TABLE

pytest.importorskip("tritonclient")
grpc = pytest.importorskip("grpc")
pytest.importorskip("grpc_health")
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # noqa: E402

from service.access import keys  # noqa: E402
from service.oip.grpc_messages import InferRequest  # noqa: E402

IMAGES = np.random.default_rng(0).random((2, *SHAPE), np.float32)
INFER = "/inference.GRPCInferenceService/ModelInfer"
SIZE = IMAGES[0].size


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from models_store.store import Store

    folder = tmp_path_factory.mktemp("hostile")
    store, port = Store(folder / "store"), free_port()
    publish(store, "images")
    publish(store, "table", spec=TABLE, member=of_features)
    server = Server(store, folder, MODEPATH_GRPC_PORT=str(port), MODEPATH_ACCESS_LOG="true")
    try:
        server.until(200)
        for name in ("images", "table"):
            server.until(200, f"/v2/models/{name}/ready")
        yield server, f"127.0.0.1:{port}"
    finally:
        server.stop()


def tensor(**changes):
    return {"name": "input", "datatype": "FP32", "shape": [1, *SHAPE], "data": IMAGES[0].ravel().tolist(), **changes}


BODIES = {
    "a text among numbers": {"inputs": [tensor(data=[1] * (SIZE - 1) + ["x" * 4000])]},
    "true among numbers": {"inputs": [tensor(data=[True] + [0.5] * (SIZE - 1))]},
    "null": {"inputs": [tensor(data=[None] * SIZE)]},
    "too few values": {"inputs": [tensor(data=[0.5])]},
    "ragged": {"inputs": [tensor(data=[[0.5], [0.5, 0.5]])]},
    "a list among numbers": {"inputs": [tensor(data=[0.5, [0.5]])]},
    "nested otherwise than its shape": {"inputs": [tensor(data=IMAGES[0].reshape(1, -1).T.tolist())]},
    "deep": {"inputs": [tensor(data=json.loads("[" * 40 + "]" * 40))]},
    "no rows": {"inputs": [tensor(shape=[0, *SHAPE], data=[])]},
    "a zero beside huge axes": {"inputs": [tensor(shape=[0, 2**39, 2**39], data=[])]},
    "huge axes": {"inputs": [tensor(shape=[2**39, 2**39], data=[])]},
    "negative": {"inputs": [tensor(shape=[-1, *SHAPE])]},
    "many axes": {"inputs": [tensor(shape=[1] * 1000)]},
    "a shape of texts": {"inputs": [tensor(shape=["1"])]},
    "a shape of booleans": {"inputs": [tensor(shape=[True])]},
    "NaN": {"inputs": [tensor(data=[2.0] * SIZE)]},
    "unknown datatype": {"inputs": [tensor(datatype="BF16")]},
    "integers beyond their type": {"inputs": [tensor(datatype="INT8", data=[300] * SIZE)]},
    "integers beyond all types": {"inputs": [tensor(datatype="INT64", data=[2**70] * SIZE)]},
    "no name": {"inputs": [{"datatype": "FP32", "shape": [1], "data": [1]}]},
    "no inputs": {"inputs": []},
    "inputs are no list": {"inputs": {"a": 1}},
    "an input is no object": {"inputs": [1]},
    "twice": {"inputs": [tensor(), tensor()]},
    "parameters are no object": {"inputs": [tensor()], "parameters": [1]},
    "an option of the wrong type": {"inputs": [tensor()], "parameters": {"coverage": "high"}},
    "the ensemble in a parameter": {"inputs": [tensor()], "parameters": {"ensemble": "table"}},
    "a long id": {"inputs": [tensor()], "id": "x" * 1000},
    "an id that is a number": {"inputs": [tensor()], "id": 5},
    "an output twice": {"inputs": [tensor()], "outputs": [{"name": "probs"}, {"name": "probs"}]},
    "an unknown output": {"inputs": [tensor()], "outputs": [{"name": "logits"}]},
    "an output that this answer has not": {"inputs": [tensor()], "outputs": [{"name": "decision"}]},
    "binary data that is not there": {"inputs": [{**tensor(), "parameters": {"binary_data_size": 50}}]},
    "an answer in bytes, or not": {"inputs": [tensor()], "parameters": {"binary_data_output": "yes"}},
    "an output in bytes, or not": {"inputs": [tensor()], "outputs": [{"name": "probs", "parameters": {"binary_data": 1}}]},
    "binary data of negative size": {"inputs": [{**tensor(), "parameters": {"binary_data_size": -1}}]},
    "texts of two axes": {"inputs": [tensor(name="images", datatype="BYTES", shape=[2, 2], data=["a"] * 4)]},
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_a_bad_request_is_refused_in_one_line(served, case):
    answer = httpx.post(served[0].url + "/v2/models/images/infer", json=BODIES[case])
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.json()["error"]) < 700
    assert httpx.get(served[0].url + "/readyz").status_code == 200


def test_what_is_not_json_or_does_not_fit_together_is_refused(served):
    url = served[0].url + "/v2/models/images/infer"
    for content, headers in (
        (b"\xff", {}), (b"[1]", {}), (b"{}", {}), (b"1", {}), (b"[" * 100_000, {}),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "5000"}),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "-1"}),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "x"}),
        (json.dumps({"inputs": [tensor()]}).encode() + b"rest", {"Inference-Header-Content-Length": str(len(json.dumps({"inputs": [tensor()]})))}),
    ):  # fmt: skip
        answer = httpx.post(url, content=content, headers={"content-type": "application/json", **headers})
        assert answer.status_code == 400, (content[:40], answer.text[:200])
    for headers in (
        {"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=x"}, {"origin": "https://other.example"},
        {"content-encoding": "gzip"},
    ):  # fmt: skip
        assert httpx.post(url, content=b"{}", headers=headers).status_code == 415
    assert httpx.post(url, content=b" " * (5 * 2**20), headers={"content-type": "application/json"}).status_code == 413


def test_many_elements_of_bytes_are_refused_before_they_are_read(served):
    head = {
        "inputs": [tensor(name="images", datatype="BYTES", shape=[10**6], parameters={"binary_data_size": 4 * 10**6})]
    }
    del head["inputs"][0]["data"]
    text = json.dumps(head).encode()
    answer = httpx.post(
        served[0].url + "/v2/models/images/infer",
        content=text + b"\0" * (4 * 10**6),
        headers={"Inference-Header-Content-Length": str(len(text))},
    )
    assert answer.status_code == 413
    assert "at most" in answer.json()["error"]


MEASURE = """
import resource, sys, time
from service.http.errors import ServiceError
from service.http.intake import Body
from service.oip import messages
from service.oip.grpc_messages import GrpcInfer
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
cases = {
    "empty inputs": b"*\\0" * 2**22, "empty outputs": b"2\\0" * 2**22, "axes": b"*" + b"\\x80\\x80\\x80\\x04" + b"\\x1a" + b"\\xfb\\xff\\xff\\x03" + b"\\x01" * (2**23 - 5),
    "unknown fields": b"\\xf8\\x07\\0" * 2**22, "a group": b"\\x0b" * 2**20, "no end": b"\\xff" * 2**20,
}
before = peak()
for name, data in cases.items():
    body = Body(); body.add(data)
    try:
        GrpcInfer(body, 1024).read(())
    except ServiceError as error:
        print(name, type(error).__name__)
text = b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1000001], "data": [' + b"1," * 10**6 + b'"' + b"x" * 10000 + b'"]}]}'
try:
    messages.read(text, None, 1024)
except ServiceError as error:
    print("text", type(error).__name__)
print("MiB", peak() - before)
"""


def test_no_message_takes_much_more_memory_than_its_bytes():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    *refused, last = done.stdout.splitlines()
    assert len(refused) == 7
    assert float(last.split()[1]) < 250


def test_hostile_messages_over_grpc_are_refused(served):
    with grpc.insecure_channel(served[1]) as channel:
        infer = channel.unary_unary(INFER)
        codes = []
        good = InferRequest(model_name="images", raw_input_contents=[IMAGES.tobytes()])
        good.inputs.add(name="input", datatype="FP32", shape=IMAGES.shape)
        assert infer(good.SerializeToString())
        for change in (
            {"raw_input_contents": [b"", b""]}, {"raw_input_contents": [b"abc"]}, {"id": "x" * 1000}, {"model_version": "9" * 30},
            {"model_name": ""}, {"model_name": "a/b"}, {"outputs": [{"name": "decision"}]}, {"outputs": [{"name": "label"}] * 2},
        ):  # fmt: skip
            bad = InferRequest()
            bad.CopyFrom(good)
            for name in change:
                bad.ClearField(name)
            bad.MergeFrom(InferRequest(**change))
            with pytest.raises(grpc.RpcError) as refused:
                infer(bad.SerializeToString())
            codes.append(refused.value.code())
        assert set(codes) <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        # A header that is no ASCII text is refused by the client; others are no key.
        with pytest.raises(grpc.RpcError):
            infer(b"\x2a\x00" * 100_000)
        assert infer(good.SerializeToString())
    assert "Traceback" not in served[0].log.read_text()
    lines = [json.loads(line) for line in served[0].log.read_text().splitlines() if line.startswith("{")]
    of_grpc = [line for line in lines if line["method"] == "gRPC" and line["path"].endswith("/infer")]
    assert {line["status"] for line in of_grpc} >= {"OK", "INVALID_ARGUMENT"}
    assert any(line.get("ensemble") == "images" and line["rows"] == 2 for line in of_grpc)


def test_open_watches_neither_block_calls_nor_delay_the_end(serve, store):
    publish(store, "images")
    port = free_port()
    server = serve(store, MODEPATH_GRPC_PORT=str(port))
    server.until(200)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(80)]
        assert next(watches[0]).status == health_pb2.HealthCheckResponse.SERVING
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status == health_pb2.HealthCheckResponse.SERVING
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 15
        assert [one.status for one in watches[0]] == [health_pb2.HealthCheckResponse.NOT_SERVING]


def test_reflection_needs_a_key_where_there_are_keys(serve, store, tmp_path):
    publish(store, "images")
    file, port = tmp_path / "keys.json", free_port()
    secret = keys.add(file, "reader", ["read"])
    server = serve(store, MODEPATH_GRPC_PORT=str(port), MODEPATH_KEYS_FILE=str(file))
    server.until(200)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = stub.ServerReflectionInfo
        one = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as refused:
            list(ask(iter([one])))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert list(ask(iter([one]), metadata=(("authorization", f"Bearer {secret}"),)))


def test_asking_for_metadata_turns_no_key(serve, store):
    publish(store, "drawn")
    policies = '{"drawn": {"modes": ["keyed"]}}'
    server = serve(store, MODEPATH_POLICIES=policies, MODEPATH_KEY_ROWS="3", MODEPATH_KEY_SECONDS="100000")
    server.until(200)

    def ask():
        rows = httpx.post(server.url + "/predict", json={"inputs": IMAGES[:1].tolist()}).json()["predictions"]
        return json.dumps(rows)

    first = ask()
    for _ in range(20):
        assert httpx.get(server.url + "/v2/models/drawn").status_code == 200
    assert ask() == first
