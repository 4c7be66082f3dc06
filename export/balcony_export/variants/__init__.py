"""Other checkpoints made from a model: one exit by itself, and cuts in width and bits."""
