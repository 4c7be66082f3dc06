"""The engines of :mod:`benchmarks.peers`, one module and one environment each: see its docstring."""
