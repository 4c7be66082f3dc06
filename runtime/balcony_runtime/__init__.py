"""The device side: lazy stages over a backend, generation, and the loop around the controller."""
