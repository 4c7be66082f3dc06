"""Balcony Edge."""
