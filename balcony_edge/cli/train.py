"""``balcony-edge train``: distil balconies (placeholder until the verb lands; overwrite this file)."""


def train() -> None:
    """Distil balconies."""
