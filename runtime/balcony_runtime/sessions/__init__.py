"""Sequences on disk: conversations and prefixes that survive the process."""
