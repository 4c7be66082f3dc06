"""Simulation of the controller on a device: loads, the plant (the simulated device), whole replies, and plans."""
