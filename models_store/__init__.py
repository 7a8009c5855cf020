"""The contract between training and service: what a published ensemble is, where it is stored, and how its members run.

Nothing here imports torch or bentoml. `training` writes through this package and `service` reads through it.
"""

import os

# Must run before anything imports onnxruntime, which otherwise sends telemetry to Microsoft and writes a device ID
# under HOME. A value set by the user is kept.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
