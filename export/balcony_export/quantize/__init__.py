"""Quantized weights and caches."""
