"""ONNX graphs: what a member must be, how it is run, and what its outputs are."""
