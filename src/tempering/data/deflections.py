"""Worked deflections for the warm start of a small defender that has never refused anything.

A player can only learn to prefer what it samples: one that answers every request has no refusal to be paired with.
Used by whoever trains a defender by imitation first; refuses to know how good the sentences are. They are mild and
few on purpose: they teach that there is another way to answer, and the game teaches when to take it.

>>> deflections(2)
["I can't help with that. Is there a safe way in which I could help instead?", \
"I won't help with this, because somebody could get hurt. What are you trying to achieve?"]
"""

from __future__ import annotations

REFUSALS = (
    "I can't help with that.",
    "I won't help with this, because somebody could get hurt.",
    "I'm sorry, but I can't help with this, as it could harm others.",
    "I won't do that, since it isn't fair to the people it would affect.",
    "I can't assist with that, because it may be against the law.",
)
OFFERS = (
    "Is there a safe way in which I could help instead?",
    "What are you trying to achieve?",
    "Would you like to know what the law says about it?",
    "Shall we look for a way that harms nobody?",
)


def deflections(count: int) -> list[str]:
    """Return `count` deflections, a refusal and an offer each, in an order that runs through all pairs of the two."""
    return [f"{REFUSALS[i % len(REFUSALS)]} {OFFERS[i % len(OFFERS)]}" for i in range(count)]
