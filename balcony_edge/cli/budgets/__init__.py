"""Verbs about budgets: what a device can keep, tried and explained without it."""
