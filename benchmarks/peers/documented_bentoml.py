"""An ensemble of ONNX files in BentoML as its documentation has one write it: adaptive batching, everything else at its default.

    MEMBERS=folder/of/onnx/files bentoml serve benchmarks.peers.documented_bentoml:Ensemble --port 3100
    curl -s localhost:3100/predict -H 'Content-Type: application/json' -d '{"inputs": [[[[0.0, 0.1, …], …]]]}'

Answers the mean of the members' softmax, one row for each image: [[0.1, 0.2, …]]. Follows BentoML's pages "Adaptive batching"
(`batchable`, `batch_dim`; default: max_batch_size 100, max_latency_ms 60000), "Define input and output types" (tensors), and
"Model composition" (several models in one service). Uses nothing of ours.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
import onnxruntime
from bentoml.validators import DType


def softmax(logits: np.ndarray) -> np.ndarray:
    """The probabilities of each row."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@bentoml.service
class Ensemble:
    """One session for each member, each with ONNX Runtime's default options."""

    def __init__(self) -> None:
        files = sorted(Path(os.environ["MEMBERS"]).glob("*.onnx"))
        self.members = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]

    @bentoml.api(batchable=True, batch_dim=0)
    def predict(self, inputs: Annotated[np.ndarray, DType("float32")]) -> np.ndarray:
        """The mean probabilities (batch, classes) of images (batch, C, H, W)."""
        return np.mean([softmax(member.run(["logits"], {"images": inputs})[0]) for member in self.members], axis=0)
