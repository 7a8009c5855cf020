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
schemathesis.openapi.format("base64-image", image("PNG").map(lambda encoded: base64.b64encode(encoded).decode()))


@schemathesis.hook
def filter_case(context, case):
    # OpenAPI cannot express "no query parameters with a JSON body", so generated valid requests may have some.
    positive = case.meta is None or case.meta.generation.mode.is_positive
    return not (positive and case.media_type == "application/json" and case.query)
