"""The Open Inference Protocol, version 2, over HTTP and gRPC: another form of the same requests and answers."""
