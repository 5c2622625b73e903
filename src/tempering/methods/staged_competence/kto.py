"""KTO on pairs: the mismatched rows whose log-ratios estimate the KL from policy to reference.

Each pair gives a desirable and an undesirable row that share its id, stage and place in the curriculum. KTO
(Ethayarajh et al. 2024, arXiv:2402.01306, section 4.2) estimates KL(policy || reference) from completions put
to a prompt that is not theirs. The maths is `core/preference.py` (`kto`, `kto_kl`).

Differs: a batch counts pairs, each with both its rows, so the numbers of desirable and undesirable rows are
equal in every step. The partner of a row is fixed for a stage, not the next row of whatever batch it is in,
so its reference log-probability is evaluated once. The estimate is one number for the whole optimiser step,
over all processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from tempering.core.chat import Encoded
from tempering.core.records import PreferencePair, content_id
from tempering.methods.staged_competence.difficulty import PairTokens

Side = Literal["chosen", "rejected"]
Row = tuple[str, Side]

EncodeSide = Callable[[Sequence[Mapping[str, str]], str], Encoded]
"""(chat turns, answer) -> tokens."""


def partners(prompts: Mapping[str, str], seed: int, stage: int) -> dict[str, tuple[Row, Row]]:
    """For the desirable and the undesirable row of each pair, the row whose completion is put to its prompt.

    Rows stand in an order keyed by (seed, stage); the partner is the next one with a different prompt.
    `prompts` maps pair id -> anything that identifies its prompt.

    Raises:
        ValueError: all prompts are equal.
    """
    if len(set(prompts.values())) < 2:
        raise ValueError("loss=kto needs at least two different prompts in every stage; use fewer stages")
    sides: tuple[Side, Side] = ("chosen", "rejected")
    order = sorted(((i, side) for i in prompts for side in sides), key=lambda row: _key(seed, stage, row))
    found: dict[Row, Row] = {}
    following = next(row for row in order if prompts[row[0]] != prompts[order[-1][0]])
    for at in reversed(range(len(order))):
        row, after = order[at], order[(at + 1) % len(order)]
        following = after if prompts[after[0]] != prompts[row[0]] else following
        found[row] = following
    return {i: (found[i, "chosen"], found[i, "rejected"]) for i in prompts}


def mismatched(
    pairs: Sequence[PreferencePair], seed: int, stage: int, encode_side: EncodeSide
) -> dict[str, PairTokens]:
    """Tokenize each pair's prompt with its two partners' completions, in the places of its own two."""
    by_id = {p.id: p for p in pairs}
    rows = partners({i: content_id(p.messages) for i, p in by_id.items()}, seed, stage)
    return {
        i: PairTokens(*(encode_side(by_id[i].messages, getattr(by_id[j], side)) for j, side in rows[i]))
        for i in sorted(by_id)
    }


def _key(seed: int, stage: int, row: Row) -> str:
    return hashlib.sha256(f"{seed}:{stage}:{row[0]}:{row[1]}".encode("utf-8", "surrogatepass")).hexdigest()
