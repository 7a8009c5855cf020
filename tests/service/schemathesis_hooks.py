"""Generators that schemathesis cannot derive from the OpenAPI schema: files that really are images and arrays."""

import base64
import io

import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image

from tests.onnx_members import SHAPE

pixels = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).random((1, *SHAPE)))


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def image(kind):
    def encode(array):
        stream = io.BytesIO()
        Image.fromarray((array[0, 0] * 255).astype(np.uint8)).save(stream, kind)
        return stream.getvalue()

    return pixels.map(encode)


schemathesis.openapi.media_type("application/x-npy", pixels.map(npy))
schemathesis.openapi.media_type("image/png", image("PNG"))
schemathesis.openapi.media_type("image/jpeg", image("JPEG"))
schemathesis.openapi.media_type("image/webp", image("WEBP"))
schemathesis.openapi.media_type("application/octet-stream", pixels.map(npy) | image("PNG"))
schemathesis.openapi.format("base64-image", image("PNG").map(lambda encoded: base64.b64encode(encoded).decode()))


@schemathesis.hook
def filter_case(context, case):
    # OpenAPI can express neither "no query parameters with a JSON body" nor which parameters need or exclude each other,
    # so generated valid requests may break these rules.
    if not (case.meta is None or case.meta.generation.mode.is_positive):
        return True
    if case.media_type == "application/json":
        fields = case.body
        if isinstance(fields, dict) and "/v2/" in case.path:
            fields = fields.get("parameters", {})
        return not case.query and (not isinstance(fields, dict) or is_consistent(fields))
    return is_consistent(case.query or {})


def is_consistent(fields):
    """Whether a service of one calibrated ensemble in `average` can answer a request with these fields."""
    given = {name: value for name, value in fields.items() if value not in (None, "null", False, "false")}
    number = {name: float(given[name]) for name in ("coverage", "risk", "wrong_cost", "review_cost") if name in given}
    of_a_set = {"set_method", "per_class", "allow_empty"} & given.keys()
    by_cost = {"wrong_cost", "review_cost"} & given.keys()
    return (
        "rule" not in given
        and not (of_a_set and "coverage" not in given)
        and number.get("coverage", 0.5) <= 0.99
        and number.get("risk", 0.5) >= 0.5
        and (
            not by_cost or (len(by_cost) == 2 and "risk" not in given and number["review_cost"] < number["wrong_cost"])
        )
    )
