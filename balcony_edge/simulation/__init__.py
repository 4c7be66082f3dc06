"""The controller on a simulated device: loads, the plant, whole replies, and plans."""
