"""Verbs that make a bundle and judge it: they need the model, its balconies and torch."""
