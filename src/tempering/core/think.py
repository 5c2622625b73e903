"""Think: the tags around reasoning before an answer. Used by everything that reads a model that deliberates."""

OPEN, CLOSE = "<think>", "</think>"
"""Plain text, not new tokens: every tokenizer can write them."""
