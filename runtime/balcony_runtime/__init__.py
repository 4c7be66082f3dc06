"""The device side: lazy stages over a backend, generation, and the decode loop around the controller."""
