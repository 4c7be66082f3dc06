"""Verbs that run a bundle, or describe it or the device."""
