"""ONNX graphs: requirements on members, sessions that run them, and checks of their outputs."""
