"""An ensemble of ONNX files behind a real Triton, by NVIDIA's own Python front end with dynamic batching.

    MEMBERS=folder/of/onnx/files PORT=8000 GRPC_PORT=8001 python -m benchmarks.peers.triton_ensemble

Its wheel holds the server itself. It runs in an environment of Python 3.11.2 (Debian's), with nvidia-pytriton and onnxruntime:
`make .venv-triton/.installed`. SHAPE is the shape of an image, such as 1,28,28, and CLASSES the number of classes. NAME is that of
the model, DELAY_US the longest time in microseconds that a request may wait for others. Uses nothing of ours.
"""

import os

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.members import Members

if __name__ == "__main__":
    shape, classes = tuple(map(int, os.environ["SHAPE"].split(","))), int(os.environ["CLASSES"])
    members = Members()

    @batch
    def infer(input: np.ndarray) -> dict[str, np.ndarray]:  # noqa: A002 - the name of the input
        """Average the members."""
        probs = members.probs(input).astype(np.float32)
        return {"probs": probs, "label": probs.argmax(axis=1).astype(np.int64)[:, None]}

    ports = TritonConfig(
        http_address="127.0.0.1", http_port=int(os.environ["PORT"]), grpc_address="127.0.0.1", grpc_port=int(os.environ["GRPC_PORT"]),
        allow_metrics=False, log_verbose=0,
    )  # fmt: skip
    with Triton(config=ports) as server:
        server.bind(
            os.environ.get("NAME", "twelve"), infer, [Tensor(name="input", dtype=np.float32, shape=shape)],
            [Tensor(name="probs", dtype=np.float32, shape=(classes,)), Tensor(name="label", dtype=np.int64, shape=(1,))],
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=int(os.environ.get("DELAY_US", "0")))),
        )  # fmt: skip
        server.serve()
