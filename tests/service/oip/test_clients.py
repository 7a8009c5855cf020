"""The Open Inference Protocol as its users' own client library speaks it, against a real server and the ONNX files."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from models_store.graphs.runtime import EnsembleSession
from models_store.inputs import fields, kinds
from models_store.manifest import InputSpec, TableField
from service.access import keys
from tests.onnx_members import SHAPE, of_features, of_tokens, publish
from tests.service.conftest import Server, free_port, workers_of
from tests.service.test_inputs import of_letters

pytest.importorskip("tritonclient")
pytest.importorskip("grpc_health")
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException

IMAGES = np.random.default_rng(0).random((3, *SHAPE), np.float32)
TABLE = InputSpec(
    kind="features", shape=(4,), low=-100, high=100,
    fields=[TableField(name="age"), TableField(name="colour", categories=["blue", "red"]), TableField(name="size")],
)  # fmt: skip
TEXT = InputSpec(kind="tokens", shape=(12,), vocabulary=30, open_length=True, tokenizer=True)
POLICIES = '{"drawn": {"modes": ["random", "keyed"]}}'
LIBRARIES = {"http": triton_http, "grpc": triton_grpc}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from models_store.store import Store

    folder = tmp_path_factory.mktemp("oip")
    store, port = Store(folder / "store"), free_port()
    versions = {
        "images": publish(store, "images"),
        "table": publish(store, "table", spec=TABLE, member=of_features),
        "text": publish(store, "text", spec=TEXT, member=of_tokens, tokenizer=of_letters()),
    }
    server = Server(store, folder, MODEPATH_GRPC_PORT=str(port), MODEPATH_WORKERS="2")
    try:
        server.until(200)
        for name in versions:
            server.until(200, f"/v2/models/{name}/ready")
        yield server, {"http": server.url.removeprefix("http://"), "grpc": f"127.0.0.1:{port}"}, versions
    finally:
        server.stop()


@pytest.fixture(params=["http", "grpc"])
def client(served, request):
    """A client of each protocol, and the library that it comes from."""
    library = LIBRARIES[request.param]
    with library.InferenceServerClient(served[1][request.param]) as made:
        yield made, library


def right_probs(version, inputs):
    session = EnsembleSession(version.folder, version.manifest, "cpu")
    return session.combine(session.member_probs(kinds.arranged(version.manifest.input, inputs))).mean_probs


def tensor(library, name, values, datatype="FP32"):
    made = library.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def test_the_server_and_the_ensemble_describe_themselves(client, served):
    asked, library = client
    assert asked.is_server_live()
    assert asked.is_server_ready()
    assert asked.is_model_ready("images")
    assert asked.is_model_ready("images", "1")
    assert not asked.is_model_ready("images", "2")
    assert not asked.is_model_ready("nothing")
    as_json = {"as_json": True} if library is triton_grpc else {}
    assert asked.get_server_metadata(**as_json)["name"] == "modepath"
    found = asked.get_model_metadata("images", **as_json)
    assert found["versions"] == ["1"]
    shapes = {one["name"]: [int(axis) for axis in one["shape"]] for one in [*found["inputs"], *found["outputs"]]}
    assert shapes["input"] == [-1, *SHAPE]
    assert shapes["probs"] == [-1, 3]
    assert shapes["uncertainty.mutual_information"] == [-1]


def test_answers_are_those_of_the_members(client, served):
    asked, library = client
    answer = asked.infer("images", [tensor(library, "input", IMAGES)], request_id="mine")
    expected = right_probs(served[2]["images"], IMAGES)
    assert answer.as_numpy("probs") == pytest.approx(expected, abs=1e-6)
    assert answer.as_numpy("label").tolist() == expected.argmax(1).tolist()
    assert answer.as_numpy("class_name").tolist() == [
        served[2]["images"].manifest.classes[label].encode() for label in expected.argmax(1)
    ]
    assert (answer.as_numpy("uncertainty.mutual_information") >= 0).all()
    response = answer.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "mine"


def test_the_outputs_that_are_named_come_in_their_order(client, served):
    asked, library = client
    wanted = [library.InferRequestedOutput(name) for name in ("members", "percentiles.confidence", "label")]
    with pytest.raises(InferenceServerException, match="not calibrated"):
        asked.infer("images", [tensor(library, "input", IMAGES)], outputs=wanted)
    answer = asked.infer("images", [tensor(library, "input", IMAGES)], outputs=[wanted[0], wanted[2]])
    assert answer.as_numpy("members").shape == (3, 3, 3)
    assert answer.as_numpy("members").mean(1) == pytest.approx(right_probs(served[2]["images"], IMAGES), abs=1e-6)
    assert answer.as_numpy("probs") is None


def test_encoded_images_are_decoded(client, served):
    asked, library = client
    spec = served[2]["images"].manifest.input
    pixels = np.random.default_rng(1).integers(0, 256, (SHAPE[1], SHAPE[2], SHAPE[0]), np.uint8).squeeze()
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        files = np.array([file.getvalue()], object)
    answer = asked.infer("images", [tensor(library, "images", files, "BYTES")])
    plain = (pixels / 255).astype(np.float32).reshape(1, *spec.shape)
    assert answer.as_numpy("probs") == pytest.approx(right_probs(served[2]["images"], plain), abs=1e-6)


def test_named_fields_are_inputs_of_their_own(client, served):
    asked, library = client
    given = [
        tensor(library, "age", np.array([31.5, -4], np.float32)),
        tensor(library, "colour", np.array([b"red", b"blue"], object), "BYTES"),
        tensor(library, "size", np.array([2, 0.5], np.float32)),
    ]
    rows = [{"age": 31.5, "colour": "red", "size": 2}, {"age": -4, "colour": "blue", "size": 0.5}]
    expected = right_probs(served[2]["table"], fields.encode(rows, TABLE))
    assert asked.infer("table", given).as_numpy("probs") == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InferenceServerException, match="size"):
        asked.infer("table", given[:2])


def test_a_field_may_be_named_as_another_form_of_input(serve, store):
    spec = InputSpec(kind="features", shape=(2,), fields=[TableField(name="texts", categories=["blue", "red"])])
    version = publish(store, "table", spec=spec, member=of_features)
    server = serve(store)
    server.until(200)
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        given = [tensor(triton_http, "texts", np.array([b"red", b"blue"], object), "BYTES")]
        found = client.infer("table", given).as_numpy("probs")
    assert found == pytest.approx(right_probs(version, np.eye(2, dtype=np.float32)[[1, 0]]), abs=1e-6)


def test_texts_and_token_ids_are_read(client, served):
    asked, library = client
    texts = np.array([b"a b c", b"z"], object)
    ids = np.array([[2, 3, 4], [27, 0, 0]], np.int64)
    expected = right_probs(served[2]["text"], ids)
    by_text = asked.infer("text", [tensor(library, "texts", texts, "BYTES")]).as_numpy("probs")
    by_ids = asked.infer("text", [tensor(library, "input", ids, "INT64")]).as_numpy("probs")
    assert by_text == pytest.approx(expected, abs=1e-6)
    assert by_ids == pytest.approx(expected, abs=1e-6)


def test_the_length_of_an_answer_of_drawn_networks_tells_nothing(serve, store):
    publish(store, "drawn")
    port = free_port()
    server = serve(store, MODEPATH_GRPC_PORT=str(port), MODEPATH_POLICIES=POLICIES)
    server.until(200)
    for protocol, library in LIBRARIES.items():
        where = f"127.0.0.1:{port}" if protocol == "grpc" else server.url.removeprefix("http://")
        with library.InferenceServerClient(where) as client:
            given = [tensor(library, "input", IMAGES)]
            answer = client.infer("drawn", given, parameters={"mode": "random"})
            assert answer.as_numpy("class_name") is None
            assert answer.as_numpy("probs").sum(1) == pytest.approx(1, abs=0.03)
            with pytest.raises(InferenceServerException, match="leave it out"):
                client.infer("drawn", given, "1", parameters={"mode": "keyed"})
    data = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, *SHAPE], "data": IMAGES[0].ravel().tolist()}]}
    lengths = {len(httpx.post(server.url + "/v2/models/drawn/infer", json=data).content) for _ in range(30)}
    assert len(lengths) == 1


@pytest.mark.parametrize(
    ("model", "version", "name", "values", "datatype", "parameters", "status", "why"),
    [
        ("nothing", "", "input", IMAGES, "FP32", None, "404 NOT_FOUND", "nothing"),
        ("images", "7", "input", IMAGES, "FP32", None, "404 NOT_FOUND", "images@7"),
        ("images", "one", "input", IMAGES, "FP32", None, "404 NOT_FOUND", "not a version"),
        ("images", "", "x", IMAGES, "FP32", None, "400 INVALID_ARGUMENT", "Unexpected input 'x'"),
        ("images", "", "input", IMAGES[:, :, :1], "FP32", None, "400 INVALID_ARGUMENT", "shape"),
        ("images", "", "input", IMAGES[0], "FP32", None, "400 INVALID_ARGUMENT", "batch axis"),
        ("images", "", "input", IMAGES.astype(np.float64), "FP64", None, "400 INVALID_ARGUMENT", "FP64"),
        ("images", "", "input", IMAGES + 3, "FP32", None, "400 INVALID_ARGUMENT", r"\[0, 1\]"),
        ("images", "", "input", IMAGES, "FP32", {"mode": "cascad"}, "400 INVALID_ARGUMENT", "mode"),
        ("images", "", "input", IMAGES, "FP32", {"colour": "red"}, "400 INVALID_ARGUMENT", "colour"),
        ("images", "", "input", IMAGES, "FP32", {"coverage": 0.9}, "400 INVALID_ARGUMENT", "not calibrated"),
        ("images", "", "images", np.array([b"no image"], object), "BYTES", None, "400 INVALID_ARGUMENT", "Element 0"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_why(client, model, version, name, values, datatype, parameters, status, why):
    asked, library = client
    with pytest.raises(InferenceServerException, match=why) as refused:
        asked.infer(model, [tensor(library, name, values, datatype)], version, parameters=parameters)
    code = str(refused.value.status()).removeprefix("StatusCode.")
    assert code in status.split()


def test_json_and_binary_data_answer_alike(served):
    client = triton_http.InferenceServerClient(served[1]["http"])
    found = []
    for sent in (True, False):
        for wanted in (True, False):
            given = triton_http.InferInput("input", list(IMAGES.shape), "FP32")
            given.set_data_from_numpy(IMAGES, binary_data=sent)
            outputs = [triton_http.InferRequestedOutput(name, binary_data=wanted) for name in ("probs", "class_name")]
            answer = client.infer("images", [given], outputs=outputs)
            found.append(
                (answer.as_numpy("probs").tolist(), np.array(answer.as_numpy("class_name")).astype(str).tolist())
            )
    assert found[0][0] == found[1][0] == found[2][0] == found[3][0]
    client.close()


def test_a_plain_json_request_needs_no_client(served):
    data = {"inputs": [{"name": "input", "datatype": "FP32", "shape": list(IMAGES.shape), "data": IMAGES.tolist()}]}
    answer = httpx.post(served[0].url + "/v2/models/images/versions/1/infer", json=data)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["model_name"], found["model_version"], found["parameters"]["mode"]) == ("images", "1", "average")
    probs = next(one for one in found["outputs"] if one["name"] == "probs")
    assert np.reshape(probs["data"], probs["shape"]) == pytest.approx(
        right_probs(served[2]["images"], IMAGES), abs=1e-6
    )


def test_asyncio_clients_work(served):
    async def go():
        found = []
        for library, where in ((triton_http_aio, "http"), (triton_grpc_aio, "grpc")):
            async with library.InferenceServerClient(served[1][where]) as client:
                given = library.InferInput("input", list(IMAGES.shape), "FP32")
                given.set_data_from_numpy(IMAGES)
                answers = await asyncio.gather(*(client.infer("images", [given]) for _ in range(20)))
                found += [answer.as_numpy("probs") for answer in answers]
        return found

    expected = right_probs(served[2]["images"], IMAGES)
    for probs in asyncio.run(go()):
        assert probs == pytest.approx(expected, abs=1e-6)


OWN_CLIENTS = """
import asyncio, json, sys, bentoml
url, inputs = sys.argv[1], json.loads(sys.argv[2])
with bentoml.SyncHTTPClient(url) as client:
    one = client.predict(inputs=inputs, ensemble="images")
async def go():
    async with bentoml.AsyncHTTPClient(url) as client:
        return await client.predict(inputs=inputs, ensemble="images", members=True)
print(json.dumps([one, asyncio.run(go())]))
"""


def test_bentomls_own_clients_work(served):
    pytest.importorskip("bentoml")
    # In a process of their own, because they leave folders behind.
    done = subprocess.run(
        [sys.executable, "-c", OWN_CLIENTS, served[0].url, json.dumps(IMAGES.tolist())],
        capture_output=True,
        text=True,
        check=True,
    )
    one, other = json.loads(done.stdout)
    expected = right_probs(served[2]["images"], IMAGES)
    assert np.array([row["probs"] for row in one["predictions"]]) == pytest.approx(expected, abs=1e-6)
    assert len(other["predictions"][0]["members"]) == 3


def test_health_and_reflection_answer(served):
    grpc = pytest.importorskip("grpc")
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(served[1]["grpc"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            health.Check(health_pb2.HealthCheckRequest(service="x"))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        ask: Any = reflection_pb2.ServerReflectionRequest
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(
            iter([ask(list_services=""), ask(file_containing_symbol="inference.GRPCInferenceService")])
        )
        listed, described = list(answers)
        assert "inference.GRPCInferenceService" in {one.name for one in listed.list_services_response.service}
        assert b"ModelInferRequest" in described.file_descriptor_response.file_descriptor_proto[0]


def test_what_is_not_a_message_of_the_protocol_is_refused(served):
    grpc = pytest.importorskip("grpc")
    with grpc.insecure_channel(served[1]["grpc"]) as channel:
        for call in ("ModelInfer", "ModelReady", "ModelMetadata"):
            send = channel.unary_unary(f"/inference.GRPCInferenceService/{call}")
            for message in (b"\xff\xff", b"\x0a\x05ab"):
                with pytest.raises(grpc.RpcError) as refused:
                    send(message)
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        too_large = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as refused:
            too_large(b"\0" * (17 * 2**20))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_keys_and_quotas_hold_for_both_protocols(serve, store, tmp_path):
    publish(store, "images")
    file, port = tmp_path / "keys.json", free_port()
    secrets = {name: keys.add(file, name, [name]) for name in ("predict", "read")}
    secrets["small"] = keys.add(file, "small", ["predict"], 7)
    server = serve(store, MODEPATH_GRPC_PORT=str(port), MODEPATH_KEYS_FILE=str(file), MODEPATH_WORKERS="2")
    server.until(200)
    where = {"http": server.url.removeprefix("http://"), "grpc": f"127.0.0.1:{port}"}
    for protocol, library in LIBRARIES.items():
        with library.InferenceServerClient(where[protocol]) as client:
            given = [tensor(library, "input", IMAGES)]
            assert client.is_server_live()

            def ask(key, client=client, given=given):
                headers = None if key is None else {"authorization": f"Bearer {key}"}
                return client.infer("images", given, headers=headers)

            for key, why in ((None, "needs an API key"), ("mp_wrong", "not known"), (secrets["read"], "scope")):
                with pytest.raises(InferenceServerException, match=why):
                    ask(key)
            assert ask(secrets["predict"]).as_numpy("label").shape == (3,)
            with pytest.raises(InferenceServerException):
                client.get_model_metadata("images", headers={"authorization": f"Bearer {secrets['predict']}"})
            assert client.get_model_metadata("images", headers={"authorization": f"Bearer {secrets['read']}"})
    # One bucket for both protocols and all workers: 7 rows allow two requests of 3 rows.
    with triton_http.InferenceServerClient(where["http"]) as client:
        client.infer(
            "images", [tensor(triton_http, "input", IMAGES)], headers={"authorization": f"Bearer {secrets['small']}"}
        )
    with triton_grpc.InferenceServerClient(where["grpc"]) as client:
        given = [tensor(triton_grpc, "input", IMAGES)]
        header = {"authorization": f"Bearer {secrets['small']}"}
        client.infer("images", given, headers=header)
        with pytest.raises(InferenceServerException, match="may ask 7 rows a minute"):
            client.infer("images", given, headers=header)


def test_a_service_that_stops_refuses_new_calls_and_ends_cleanly(serve, store):
    publish(store, "images")
    port = free_port()
    server = serve(store, MODEPATH_GRPC_PORT=str(port), MODEPATH_WORKERS="2")
    server.until(200)
    assert len(workers_of(server)) == 2

    async def go():
        answered, refused = 0, []
        stopped = False
        async with triton_grpc_aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            given = triton_grpc_aio.InferInput("input", list(IMAGES.shape), "FP32")
            given.set_data_from_numpy(IMAGES)
            began = time.monotonic()
            while not refused and time.monotonic() - began < 30:
                if answered > 200 and not stopped:
                    os.kill(server.process.pid, signal.SIGTERM)
                    stopped = True
                try:
                    await client.infer("images", [given])
                    answered += 1
                except InferenceServerException as error:
                    refused.append(str(error.status()))
        return answered, refused

    answered, refused = asyncio.run(go())
    assert answered > 200
    # gRPC itself cancels a call that it has not handed over yet.
    assert refused[0] in ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED")
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_port_that_is_taken_is_named(serve, store):
    publish(store, "images")
    port = free_port()
    serve(store, MODEPATH_GRPC_PORT=str(port)).until(200)
    second = serve(store, MODEPATH_GRPC_PORT=str(port))
    assert second.process.wait(60) != 0
    assert "MODEPATH_GRPC_PORT" in second.log.read_text()
    assert "Traceback" not in second.log.read_text()
