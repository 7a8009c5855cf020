"""What schemathesis cannot read in the description: files that really are images and arrays."""

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
    # OpenAPI has no words for "no query beside a JSON body", so its idea of a right request may have one.
    positive = case.meta is None or case.meta.generation.mode.is_positive
    return not (positive and case.media_type == "application/json" and case.query)
