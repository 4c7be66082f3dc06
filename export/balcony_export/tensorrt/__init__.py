"""Graphs for TensorRT, and the engine sets built from them."""
