"""The members of an ensemble as a good engineer runs them in an hour: one thread a session, the sessions of a batch side by side.

Uses nothing of ours. Peers are given this instead of ONNX Runtime's defaults, with which several sessions fight for the cores.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime


class Members:
    """All ONNX files of the folder MEMBERS."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        files = sorted(Path(os.environ["MEMBERS"]).glob("*.onnx"))
        self._sessions = [onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"]) for file in files]
        self._input = self._sessions[0].get_inputs()[0].name
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def probs(self, images: np.ndarray) -> np.ndarray:
        """The mean of the members' softmax, (batch, classes)."""
        logits = np.stack(list(self._pool.map(lambda one: one.run(None, {self._input: images})[0], self._sessions)))
        exponentials = np.exp(logits - logits.max(axis=2, keepdims=True))
        return (exponentials / exponentials.sum(axis=2, keepdims=True)).mean(axis=0)
