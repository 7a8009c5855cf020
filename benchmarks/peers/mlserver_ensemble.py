"""An ensemble of ONNX files in MLServer, as a runtime of one's own with its adaptive batching.

    MEMBERS=folder/of/onnx/files python -m benchmarks.peers.mlserver_ensemble FOLDER PORT GRPC_PORT NAME

writes the settings into FOLDER and starts `mlserver start`. Uses nothing of ours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ != "__main__":
    from mlserver import MLModel
    from mlserver.codecs import NumpyCodec
    from mlserver.types import InferenceRequest, InferenceResponse

    from benchmarks.peers.members import Members

    class Ensemble(MLModel):
        """One model of MLServer."""

        async def load(self) -> bool:
            """Load the members."""
            self._members = Members()
            return True

        async def predict(self, payload: InferenceRequest) -> InferenceResponse:
            """Average the members."""
            images = NumpyCodec.decode_input(payload.inputs[0]).astype("float32")
            probs = self._members.probs(images)
            return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("probs", probs)])


if __name__ == "__main__":
    folder, port, grpc_port, name = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "http_port": port,
        "grpc_port": grpc_port,
        "metrics_port": port + 2000 if port < 60000 else port - 2000,
        "parallel_workers": 0,
        "debug": False,
    }
    model = {
        "name": name,
        "implementation": "benchmarks.peers.mlserver_ensemble.Ensemble",
        "max_batch_size": 64,
        "max_batch_time": 0.001,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    script = Path(sys.executable).parent / "mlserver"
    sys.exit(
        subprocess.call([script, "start", folder], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    )
