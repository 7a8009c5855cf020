"""Every network of a curve answers one image, if the policy shows which network answers."""

import json

import httpx
import numpy as np
import pytest

from models_store.uncertainty import softmax
from tests.onnx_members import SHAPE, bank, point_logits, publish

T = np.linspace(0, 1, 7)
BEZIER = np.stack([(1 - T) ** 2, 2 * T * (1 - T), T**2], axis=1)
CHAIN = np.stack([np.maximum(1 - 2 * T, 0), 1 - np.abs(2 * T - 1), np.maximum(2 * T - 1, 0)], axis=1)
SHOWN = {"modes": ["average", "random"], "probabilities": "exact", "point": True}
image = np.random.default_rng(0).random((1, *SHAPE), np.float32)


@pytest.mark.parametrize(("shape", "coefficients"), [("bezier", BEZIER), ("polychain", CHAIN)])
def test_each_point_answers_at_its_place_and_temperature(store, serve, shape, coefficients):
    accuracy = np.linspace(0.5, 0.9, 7)
    points = bank(points=7, coefficients=coefficients, accuracy=accuracy)
    publish(store, "curve", bank=points, shape_of_path=shape)
    server = serve(store, MODEPATH_POLICIES=json.dumps({"curve": SHOWN}))
    server.until(200)
    assert httpx.get(server.url + "/ensembles/curve").json()["path"] is True
    body = httpx.post(server.url + "/ensembles/curve/path", json={"inputs": image.tolist()}).json()
    assert (body["ensemble"], body["version"], body["shape"]) == ("curve", 1, shape)
    assert [one["point"] for one in body["points"]] == list(range(7))
    assert [one["t"] for one in body["points"]] == pytest.approx(T)
    assert [one["accuracy"] for one in body["points"]] == pytest.approx(accuracy)
    expected = [softmax(point_logits(points, k, image), points.temperature[k])[0] for k in range(7)]
    assert np.array([one["probs"] for one in body["points"]]) == pytest.approx(np.array(expected), abs=1e-5)
    two = httpx.post(server.url + "/ensembles/curve/path", json={"inputs": np.repeat(image, 2, axis=0).tolist()})
    assert two.status_code == 413


@pytest.mark.parametrize(
    "policy",
    [
        {"modes": ["average"]},
        {"modes": ["random"], "probabilities": "exact", "point": True},
        {"modes": ["average", "random"], "probabilities": "exact"},
        {"modes": ["average", "random"], "point": True},
    ],
    ids=["closed", "defended", "unnamed", "rounded"],
)
def test_a_policy_that_shows_less_shows_no_path(store, serve, policy):
    publish(store, "curve", bank=bank(points=7, coefficients=BEZIER), shape_of_path="bezier")
    server = serve(store, MODEPATH_POLICIES=json.dumps({"curve": policy}))
    server.until(200)
    assert httpx.get(server.url + "/ensembles/curve").json()["path"] is False
    refused = httpx.post(server.url + "/ensembles/curve/path", json={"inputs": image.tolist()})
    assert refused.status_code == 404
    assert "are not shown" in refused.json()["error"]


def test_a_simplex_and_an_unknown_ensemble_have_no_path(store, serve):
    publish(store, "simplex", bank=bank(points=7))
    server = serve(store, MODEPATH_POLICIES=json.dumps({"simplex": SHOWN}))
    server.until(200)
    statuses = [
        httpx.post(f"{server.url}/ensembles/{name}/path", json={"inputs": image.tolist()}).status_code
        for name in ("simplex", "nobody")
    ]
    assert statuses == [404, 404]
