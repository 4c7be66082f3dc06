"""The workstation side: checkpoint, balconies, graphs, verification."""
