"""From PyTorch modules to ONNX graphs, and the passes over them."""
