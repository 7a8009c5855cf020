"""An ensemble of ONNX files in LitServe as its documentation has one write it: batching, everything else at its default.

    MEMBERS=folder/of/onnx/files PORT=3200 python -m benchmarks.peers.litserve_ensemble
    curl -s localhost:3200/predict -H 'Content-Type: application/json' -d '{"inputs": [[[[0.0, 0.1, …], …]]]}'
    curl -s localhost:3200/predict -H 'Content-Type: application/x-npy' --data-binary @image.npy

One image (1, C, H, W) a request, as LitServe's batching wants it; answers the mean of the members' softmax, {"output": [0.1, …]}.
MAX_BATCH_SIZE and BATCH_TIMEOUT (seconds) default to the values in the documentation of `litserve.LitAPI`, WORKERS to LitServe's
own default, 1. Uses nothing of ours.
"""
# No `from __future__ import annotations`: LitServe hands the annotation of decode_request to FastAPI as it stands.

import io
import os
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
import onnxruntime
from fastapi import Body


def softmax(logits: np.ndarray) -> np.ndarray:
    """The probabilities of each row."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


class Ensemble(litserve.LitAPI):
    """One session for each member, each with ONNX Runtime's default options; `batch` and `unbatch` are LitServe's own."""

    def setup(self, device: str) -> None:
        """Loads the members, once in each worker."""
        files = sorted(Path(os.environ["MEMBERS"]).glob("*.onnx"))
        self.members = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]

    def decode_request(self, request: Annotated[Any, Body()]) -> np.ndarray:
        """One image (C, H, W). FastAPI hands over JSON parsed, and a body of any other type as bytes."""
        images = np.load(io.BytesIO(request)) if isinstance(request, bytes) else request["inputs"]
        (image,) = np.asarray(images, dtype=np.float32)
        return image

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The mean probabilities (batch, classes) of images (batch, C, H, W)."""
        return np.mean([softmax(member.run(["logits"], {"images": images})[0]) for member in self.members], axis=0)

    def encode_response(self, output: np.ndarray):
        """The body of the answer."""
        return {"output": output.tolist()}


if __name__ == "__main__":
    size, seconds = int(os.environ.get("MAX_BATCH_SIZE", "8")), float(os.environ.get("BATCH_TIMEOUT", "0.1"))
    api = Ensemble(max_batch_size=size, batch_timeout=seconds)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ.get("WORKERS", "1")))
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False)
