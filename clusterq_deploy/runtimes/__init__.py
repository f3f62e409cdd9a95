"""What executes a model: torch, ONNX Runtime, TensorRT."""
