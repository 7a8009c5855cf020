"""The client against a real service, and its retries against scripted responses."""

import asyncio
import dataclasses
import io
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from models_store.uncertainty import combine, softmax
from service import client as module
from service.client import Answer, AsyncClient, Client, RefusedError
from service.http.schemas import PredictResponse, RowPrediction
from tests.onnx_members import SHAPE, linear, linear_logits, publish

images = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)
members = np.stack([softmax(linear_logits(linear(seed), images)) for seed in (0, 1, 2)])
average = combine(members, np.full(3, 1 / 3))


def png(image):
    stream = io.BytesIO()
    Image.fromarray((image[0] * 255).round().astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def check(answer):
    assert answer.probs == pytest.approx(average.mean_probs, abs=1e-5)
    assert answer.members == pytest.approx(members, abs=1e-5)
    assert answer.labels.tolist() == average.label.tolist()
    assert answer.confidence == pytest.approx(average.confidence, abs=1e-5)
    assert answer.uncertainty["mutual_information"] == pytest.approx(average.mutual_information, abs=1e-5)
    assert set(answer.uncertainty) == {"predictive_entropy", "expected_entropy", "mutual_information", "disagreement"}
    assert (answer.ensemble, answer.version, answer.mode, answer.members_used) == ("animals", 1, "average", 3)
    assert answer.class_names == [["cat", "dog", "bird"][label] for label in answer.labels]


def test_both_clients_against_a_service(store, serve):
    publish(store, "animals")
    publish(store, "other", seeds=(7,))
    server = serve(store, MODEPATH_DEFAULT="other")
    server.until(200)
    with Client(server.url) as client:
        check(client.predict(images, ensemble="animals", members=True))
        plain = client.predict(images.tolist())
        assert (plain.ensemble, plain.members) == ("other", None)
        assert {e["name"] for e in client.ensembles()} == {"animals", "other"}
        bytes_ = (images * 255).round() / 255
        encoded = client.predict([png(image) for image in images], ensemble="animals")
        assert encoded.probs == pytest.approx(client.predict(bytes_, ensemble="animals").probs, abs=1e-6)
        with pytest.raises(RefusedError, match="400: The array has values") as refused:
            client.predict(images * 255)
        assert refused.value.status == 400
        with pytest.raises(RefusedError, match="404"):
            client.predict(images, ensemble="nope")

    async def go():
        async with AsyncClient(server.url) as client:
            answers = await asyncio.gather(
                *(client.predict(images, ensemble="animals", members=True) for _ in range(20))
            )
            assert {e["name"] for e in await client.ensembles()} == {"animals", "other"}
            return answers

    for answer in asyncio.run(go()):
        check(answer)
    server.stop()
    with pytest.raises(httpx.TransportError), Client(server.url, attempts=2) as client:
        client.predict(images)


GOOD = {
    "ensemble": "a", "version": 1, "mode": "average", "members_used": 1, "request_id": "1",
    "predictions": [{"label": 0, "class_name": "cat", "confidence": 1.0, "probs": [1.0], "uncertainty": {}}],
}  # fmt: skip


@pytest.fixture
def scripted(monkeypatch):
    """A function that returns a client whose transport follows a script, its pauses, and the remaining steps."""
    pauses = []
    here, sleep = threading.get_ident(), time.sleep
    monkeypatch.setattr(
        "tenacity.nap.time.sleep", lambda s: pauses.append(s) if threading.get_ident() == here else sleep(s)
    )

    def make(*script, attempts=5):
        steps = list(script)

        def handle(request):
            step = steps.pop(0)
            if isinstance(step, Exception):
                raise step
            status, headers = step
            return httpx.Response(status, json=GOOD if status == 200 else {"error": "told"}, headers=headers)

        client = Client("http://test", attempts=attempts)
        client.close()
        client._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(handle))
        return client, pauses, steps

    return make


def test_what_passes_is_asked_again_and_not_before_the_service_said(scripted):
    client, pauses, _ = scripted((503, {"Retry-After": "2"}), httpx.ConnectError("x"), (429, {}), (200, {}))
    assert client.predict(images).labels.tolist() == [0]
    assert len(pauses) == 3
    assert pauses[0] >= 2


@pytest.mark.parametrize("status", [400, 404, 413, 415, 500])
def test_what_does_not_pass_is_not_asked_again(scripted, status):
    client, pauses, _ = scripted((status, {}))
    with pytest.raises(RefusedError, match=f"{status}: told"):
        client.predict(images)
    assert not pauses


def test_a_service_that_was_too_slow_is_not_given_the_same_work_again(scripted):
    client, pauses, _ = scripted(httpx.ReadTimeout("slow"), (200, {}))
    with pytest.raises(httpx.ReadTimeout):
        client.predict(images)
    assert not pauses


def test_it_gives_up_with_the_last_reason(scripted):
    client, pauses, left = scripted(*[(503, {})] * 5, attempts=3)
    with pytest.raises(RefusedError, match="503"):
        client.predict(images)
    assert (len(pauses), len(left)) == (2, 2)


def test_an_answer_of_somebody_else_is_told():
    with pytest.raises(RefusedError, match="502: <html>"):
        module._read(httpx.Response(502, text="<html>bad gateway"))


def test_the_clients_answer_has_every_field_of_the_response():
    """A new field of the response must be added to Answer, too; otherwise the client silently drops it."""
    named_otherwise = {
        "predictions": None, "label": "labels", "class_name": "class_names", "point": "points",
        "prediction_set": "prediction_sets", "decision": "decisions", "reason": "reasons",
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(Answer)}
    for field in (*PredictResponse.__annotations__, *RowPrediction.__annotations__):
        assert named_otherwise.get(field, field) in {*fields, None}
    body = {
        "ensemble": "a", "version": 1, "mode": "random", "request_id": "x",
        "predictions": [{"label": 1, "class_name": "dog", "confidence": 0.5, "probs": [0.5, 0.5], "point": 7}],
    }  # fmt: skip
    assert module._answer(body).points.tolist() == [7]
