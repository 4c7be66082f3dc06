"""The engine of one reply: speed and memory of exits, switches and steps, and the start of a process."""
