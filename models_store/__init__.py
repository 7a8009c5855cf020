"""The contract between training and service: what a published ensemble is, where it lies, how its members run.

Nothing here imports torch or bentoml. `training` writes through this package and `service` reads through it.
"""

import os

# Before anything imports onnxruntime, which reports to Microsoft and writes a device's number under HOME. A user's own setting stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
