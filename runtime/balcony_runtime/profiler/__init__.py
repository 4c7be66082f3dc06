"""The profiler: measures the cost of every exit of a bundle on this device, and fits the prices that the controller reads.

grid        the quantities to measure: prompts, depths, pending rows
cells       the measurement of each quantity, through the public API and through the engine's graphs
timing      from samples to percentiles and an interval
fit         from passes to prices
conditions  conditions of the measurement: clocks, heat, other load, power
results     from samples to the entries, prices and facts of a device profile
run         rounds over all cells until the intervals are tight; makes the device profile
report      a device profile as one HTML page
charts      the charts of that page
"""
