"""Precisions, models of other sizes and shapes, and exits that were extracted."""
