"""The device and the cost of a token on it: the machine's identity, the device profile, the cost model, sensor readings."""
