"""What untrusted bytes reach first: each target takes any bytes, and raises nothing but what its callers handle.

benchmarks/faults/fuzzing.py gives them bytes that reach new branches; test_corpora.py gives them what that found.
"""

import tempfile
from pathlib import Path

import numpy as np

from models_store.errors import MemberError, ModepathError
from models_store.graphs.onnx_contract import check_member
from models_store.inputs.fields import TableField
from models_store.manifest import InputSpec, Manifest
from service.http import bodies
from service.http.errors import ServiceError
from service.http.images import Encoded, Limits

SHAPE = (1, 4, 4)
LIMITS = Limits(rows=8, bytes=10**6, pixels=10**5)
PICTURE = InputSpec(shape=(3, 8, 8), resize="crop")
SPECS = [
    InputSpec(shape=SHAPE),
    InputSpec(kind="features", shape=(3,), fields=[TableField(name="age"), TableField(name="job", categories=["a", "b"])]),
    InputSpec(kind="tokens", shape=(6,), vocabulary=9, open_length=True),
]  # fmt: skip


def _asked(media_type, data, spec):
    try:
        asked = bodies.read_request(media_type, [], bytearray(data), [spec], LIMITS.rows)
        if asked.texts is not None:
            return
        found = asked.open(spec, LIMITS)
        images = found.decode() if isinstance(found, Encoded) else found
    except ServiceError as error:
        if error.status >= 500:
            raise
        return
    assert 1 <= len(images) <= LIMITS.rows
    assert images.dtype in (np.float32, np.int64)
    if spec.kind == "image":
        assert images.shape[1:] == spec.shape
        assert 0 <= images.min() <= images.max() <= 1


def image(data):
    """An encoded image, whatever its media type claims."""
    _asked("application/octet-stream", data, PICTURE)


def npy(data):
    """An array, or several named ones."""
    for spec in SPECS:
        _asked("application/x-npz" if data.startswith(b"PK") else "application/x-npy", data, spec)


def json(data):
    """A JSON body."""
    for spec in SPECS:
        _asked("application/json", data, spec)


def manifest(data):
    """A manifest of a version."""
    try:
        found = Manifest.parse(data, "a manifest")
    except ModepathError:
        return
    assert Manifest.parse(found.dump(), "its copy").members == found.members or found.digest is not None


def onnx(data):
    """A member from elsewhere."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(data)
        file.flush()
        try:
            check_member(Path(file.name), InputSpec(shape=SHAPE), 3)
        except MemberError:
            return


TARGETS = {target.__name__: target for target in (image, npy, json, manifest, onnx)}
