"""Measurements of Balcony Edge on a real bundle; see benchmarks/README.md. They are not part of the distribution."""
