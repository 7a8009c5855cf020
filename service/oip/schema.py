"""The protocol's messages, from the compiled grpc_predict_v2.proto.

They are made at run time, in a pool of their own: so they fit whichever release of protobuf is installed, and a client
library in the same process may define the same names. After a change of the .proto file:

    python -m grpc_tools.protoc -Iservice/oip --descriptor_set_out=service/oip/grpc_predict_v2.binpb grpc_predict_v2.proto
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2

SERVICE = "inference.GRPCInferenceService"
COMPILED = Path(__file__).parent / "grpc_predict_v2.binpb"


def _loaded() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(COMPILED.read_bytes()).file:
        pool.Add(file)
    pool.AddSerializedFile(health_pb2.DESCRIPTOR.serialized_pb)  # the reflection service describes both
    return pool


POOL = _loaded()


def message(name: str) -> Any:
    """Return the class of a message of the protocol."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))
