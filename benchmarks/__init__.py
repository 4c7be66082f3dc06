"""Measurements of Balcony Edge on a real bundle: see benchmarks/README.md. Not part of the distribution."""
