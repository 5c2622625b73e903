"""How much sets of texts share, word for word: a contaminated comparison shows here. Numbers alone, never a text.

Used by methods that train on some texts and are measured on others; refuses to know what the sets are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

SIZE = 8
"""Tokens of an n-gram; a text that is shorter is one n-gram."""
MOST = 5000
"""Texts that are read of each set, and tokens of each text, over SIZE at a time."""


def overlaps(sets: Mapping[str, Sequence[Sequence[Hashable]]], size: int = SIZE) -> list[dict[str, Any]]:
    """Return for every two sets, both ways round, what of the one stands in the other.

    `sharing`: texts of the one with an n-gram that stands in the other. `share`: of the one's different n-grams. Sets
    without texts are left out.

    >>> overlaps({"a": ["abcd", "xyz"], "b": ["zbcd"]}, size=3)[0]
    {'of': 'a', 'in': 'b', 'texts': 2, 'sharing': 1, 'share': 0.3333}
    """
    grams = {name: [grams_of(text, size) for text in texts[:MOST]] for name, texts in sets.items() if texts}
    whole = {name: frozenset().union(*found) for name, found in grams.items()}
    return [
        {
            "of": one,
            "in": other,
            "texts": len(grams[one]),
            "sharing": sum(not found.isdisjoint(whole[other]) for found in grams[one]),
            "share": round(len(whole[one] & whole[other]) / max(len(whole[one]), 1), 4),
        }
        for one, other in itertools.permutations(grams, 2)
    ]


def grams_of(text: Sequence[Hashable], size: int) -> frozenset[int]:
    """Hashes of the n-grams of a text."""
    kept = text[:MOST]
    return frozenset(hash(tuple(kept[i : i + size])) for i in range(max(1, len(kept) - size + 1)))
