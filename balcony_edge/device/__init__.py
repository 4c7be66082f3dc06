"""What a device is and what a token costs on it: fingerprint, device profile, cost model, sensor readings."""
