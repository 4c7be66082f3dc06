"""The profiler: measures what every exit of a bundle costs on this device, and fits the prices that the controller reads.

grid        what is measured: prompts, depths, pending rows
cells       how each quantity is measured, over the public API and over the engine's graphs
timing      samples to percentiles and an interval
fit         passes to prices
conditions  what else went on: clocks, heat, competing load, power
run         rounds over all cells until the intervals are tight; a profile
report      a profile as one HTML page
"""
