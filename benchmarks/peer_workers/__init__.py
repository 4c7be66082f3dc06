"""The engines of :mod:`benchmarks.peers`, each with its own module and environment; see its docstring."""
