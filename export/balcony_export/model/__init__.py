"""The PyTorch side of a model: checkpoints, what an architecture needs, balconies."""
