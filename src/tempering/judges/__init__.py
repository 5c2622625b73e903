"""Judges: callables that say whether a completion is harmful, or a refusal."""
