from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from service.app import _Routes
from service.http import openapi
from service.operations.settings import Settings
from tests.onnx_members import SHAPE, publish


def routes(guard):
    return _Routes(Settings(), SimpleNamespace(guard=guard)).all()


@pytest.fixture
def served(store):
    return [publish(store, "a").manifest, publish(store, "wide", shape=(3, 2, 2)).manifest]


def document(served=(), **options):
    return openapi.document(served, ["average"], 5, **{"has_metrics": True, **options})


@pytest.mark.parametrize("guard", [None, "keys"])
def test_it_names_every_route_and_method(guard):
    found = document(has_keys=guard is not None)
    documented = {(path, method.upper()) for path, methods in found["paths"].items() for method in methods}
    pages = {"/", "/ui", "/ui/{name}", "/docs", "/docs/{name}"}  # for people
    there = {
        (route.path, method)
        for route in routes(guard)
        for method in route.methods - {"HEAD"}
        if route.path not in pages
    }
    assert documented == there
    assert "/metrics" not in document(has_metrics=False)["paths"]


def test_every_reference_leads_somewhere(served):
    found = document(served)
    references = [r.split('"')[0] for r in str(found).replace("'", '"').split("#/components/schemas/")[1:]]
    assert references
    assert set(references) <= set(found["components"]["schemas"])


def test_requests_are_described_by_what_is_served(served):
    found = document(served)
    schema = {**found["components"]["schemas"]["PredictRequest"], "components": found["components"]}
    right = jsonschema.Draft202012Validator(schema).is_valid
    image = np.full(SHAPE, 0.5).tolist()
    assert right({"inputs": [image]})
    assert right({"inputs": [np.zeros((3, 2, 2)).tolist()] * 5, "ensemble": "wide", "mode": "average", "members": True})
    assert right({"images": ["abcd"]})
    wrong = [
        {}, {"inputs": []}, {"inputs": image}, {"inputs": [image] * 6}, {"inputs": [np.full(SHAPE, 2).tolist()]},
        {"inputs": [image], "images": ["abcd"]}, {"images": []}, {"inputs": [image], "ensemble": "nope"},
        {"inputs": [image], "mode": "random"}, {"inputs": [image], "extra": 1}, {"inputs": None}, {"inputs": [[[[0.5]]]]},
    ]  # fmt: skip
    assert not [body for body in wrong if right(body)]


def test_it_can_be_written_before_anything_is_served():
    assert document([])["components"]["schemas"]["PredictRequest"]["properties"]["inputs"]["type"] == "array"
