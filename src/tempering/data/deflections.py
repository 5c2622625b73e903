"""Worked deflections for the warm start of a small defender that has never refused anything.

A player can only learn to prefer what it samples: one that answers every request has no refusal to be paired with.
Used by whoever trains a defender by imitation first; refuses to know how good the sentences are. They are mild and
few on purpose: they teach that there is another way to answer, and the game teaches when to take it.

>>> print(deflection("Hide the bill!", 0))
I can't help with "hide the bill". It could harm somebody. What are you trying to achieve?
"""

from __future__ import annotations

REFUSALS = ("I can't help with", "I won't help with", "I'm sorry, but I can't help with")
REASONS = (
    "It could harm somebody.",
    "It isn't fair to others.",
    "It may be against the law.",
    "Somebody could get hurt.",
)
OFFERS = (
    "What are you trying to achieve?",
    "Is there a safe way in which I could help?",
    "Shall we look for a way that harms nobody?",
)


def deflection(request: str, i: int) -> str:
    """Return a refusal that names the request, a reason, and an offer, each the i-th of its kind in turn."""
    named = request.strip().rstrip(".!?")
    named = named[:1].lower() + named[1:]
    return f'{REFUSALS[i % len(REFUSALS)]} "{named}". {REASONS[i % len(REASONS)]} {OFFERS[i // 2 % len(OFFERS)]}'
