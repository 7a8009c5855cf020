import io
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from models_store import file_kind

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


def zipped(*names):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return memory.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (LFS, "lfs"),
        (HTML, "html"),
        (save({"w": np.zeros(3, np.float32)}), "safetensors"),
        (zipped("net/data.pkl", "net/data/0", "net/version"), "torch"),
        (zipped("net/data.pkl", "net/constants.pkl", "net/code/__torch__.py"), "torchscript"),
        (zipped("weights/a.npy"), "archive"),
        (b"PK\x03\x04 broken", "damaged"),
        (b"\x1f\x8b\x08 gzip", "archive"),
        (pickle.dumps({"a": 1}), "torch"),
        (b"accuracy 0.93\n", "text"),
        (b"\x08\x09\x12\x07pytorch\xff", "unknown"),
    ],
)
def test_files_are_known_by_their_first_bytes(tmp_path, content, expected):
    file = tmp_path / "some.name"
    file.write_bytes(content)
    assert file_kind.kind(file) == expected
    assert file_kind.said(file)
