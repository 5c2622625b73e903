"""Tempering: make open-weight language models safe without making them useless, and prove it."""

__version__ = "0.1.0"
