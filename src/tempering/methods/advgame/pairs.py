"""A rollout tree, what became of each of its nodes, what they are worth, and the pairs that are trained on. Pure.

A tree is one seed: attacks that rewrite it, and under each attack the answers to it. A node fails at the first thing
that is wrong with it (`Status`); failures of its own lose to anything that has a score, failures of a judge, or of
the other player, say nothing and are in no pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from tempering.core.records import Finish

Status = Literal[
    "OK",
    "MAX_LENGTH",
    "PARSING",
    "BAD_FAITH_JUDGE",
    "NOT_FAITHFUL",
    "PROMPT_NOT_VALID",
    "BAD_DEF_JUDGE",
    "NO_VALID_RESPONSE",
    "BAD_ATT_JUDGE",
]
STATUSES: tuple[Status, ...] = get_args(Status)
LOSES: frozenset[Status] = frozenset({"MAX_LENGTH", "PARSING", "NOT_FAITHFUL"})
"""What a player did wrong by itself: worth `LOST`."""
LOST = -1.0
"""Less than any score; scores are points from 0 to 10."""


@dataclass(frozen=True)
class Response:
    """What a player wrote, an attack or an answer, and what became of it."""

    token_ids: tuple[int, ...]
    """As sampled, with the end-of-turn token where it stopped: what is trained on."""
    text: str
    finish: Finish | None
    """`None`: never sampled, because the attack before it was not valid."""
    prompt: str | None = None
    """What the other player, or the judge, is shown of it; `None`: the parser found nothing."""
    status: Status = "OK"
    score: float | None = None
    """Points of the judge, 0 to 10; `None`: unscored, or there is no judge (then `status` is OK)."""
    reward: float | None = None
    """See `patch_rewards`; `None` is in no pair."""
    logprobs: tuple[float, ...] = ()
    """Of the tokens under what sampled them, in nats, where they are kept."""


@dataclass(frozen=True)
class AttackNode:
    """An attack and the answers to it; none, or never-sampled ones, where the attack is not valid."""

    attack: Response
    responses: tuple[Response, ...] = ()


@dataclass(frozen=True)
class Tree:
    """All that was played on one seed."""

    seed_id: str
    category: Literal["harmful", "benign"]
    seed: str
    attacks: tuple[AttackNode, ...]


class Pair(NamedTuple):
    """Two completions of the same prompt, of which one was worth more."""

    attack: int | None
    """Whose answers these are; `None`: attacks on the seed."""
    chosen: int
    """Place among the attacks, or among the answers."""
    rejected: int
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    """Cut to the length of the chosen ones where it never stopped."""
    rewards: tuple[float, float]
    """Of chosen and rejected."""
    statuses: tuple[Status, Status]


class TreePairs(NamedTuple):
    """The pairs of one seed: at most one for the attacker, and one for the defender under each valid attack."""

    attacker: Pair | None
    defender: tuple[Pair, ...]


def attack_status(
    finish: Finish,
    is_parsed: bool,
    *,
    is_faithful: bool | None = True,
    is_answered: bool = True,
    is_scored: bool = True,
) -> Status:
    """Name the first thing that is wrong with an attack; what has not happened yet is left at its default.

    `is_faithful` None: the judge did not say. `is_answered`: one of its answers is OK. `is_scored`: the attacker's
    judge gave it points, or there is none.

    >>> attack_status("stop", True), attack_status("length", False), attack_status("stop", True, is_faithful=None)
    ('OK', 'MAX_LENGTH', 'BAD_FAITH_JUDGE')
    """
    rows: tuple[tuple[bool, Status], ...] = (
        (finish != "stop", "MAX_LENGTH"),
        (not is_parsed, "PARSING"),
        (is_faithful is None, "BAD_FAITH_JUDGE"),
        (not is_faithful, "NOT_FAITHFUL"),
        (not is_answered, "NO_VALID_RESPONSE"),
        (not is_scored, "BAD_ATT_JUDGE"),
    )
    return next((status for holds, status in rows if holds), "OK")


def response_status(finish: Finish | None, is_parsed: bool = True, *, is_scored: bool = True) -> Status:
    """Name the first thing that is wrong with an answer; `finish` None: never sampled, for want of a valid attack.

    >>> response_status("stop"), response_status(None), response_status("stop", is_scored=False)
    ('OK', 'PROMPT_NOT_VALID', 'BAD_DEF_JUDGE')
    """
    rows: tuple[tuple[bool, Status], ...] = (
        (finish is None, "PROMPT_NOT_VALID"),
        (finish != "stop", "MAX_LENGTH"),
        (not is_parsed, "PARSING"),
        (not is_scored, "BAD_DEF_JUDGE"),
    )
    return next((status for holds, status in rows if holds), "OK")


def node_reward(status: Status, score: float | None) -> float | None:
    """What a node is worth: its points where OK (0 without a judge), `LOST` for a failure of its own, else nothing.

    >>> [node_reward(*node) for node in (("OK", 7.0), ("OK", None), ("PARSING", None), ("BAD_ATT_JUDGE", 3.0))]
    [7.0, 0.0, -1.0, None]
    """
    if status in LOSES:
        return LOST
    return (0.0 if score is None else score) if status == "OK" else None


Speaker = Literal["optimistic", "first", "mean"]
"""The answers that speak for an attack: the one of most points, the first, or all, whose points are averaged."""


def speaking_responses(responses: Sequence[Response], speaker: Speaker = "optimistic") -> list[int]:
    """The answers by which an attack is judged, of those that are OK; none, where none is.

    `optimistic`: the one of most points (ties: the first); `first`: the first; `mean`: all.
    """
    valid = [d for d, response in enumerate(responses) if response.status == "OK"]
    if not valid or speaker == "mean":
        return valid
    if speaker == "first":
        return valid[:1]
    return [max(valid, key=lambda d: node_reward("OK", responses[d].score) or 0.0)]


def patch_rewards(tree: Tree) -> Tree:
    """Give every node its reward, from its status and points.

    An attack that seemed valid with no OK answer under it becomes NO_VALID_RESPONSE first.
    """
    nodes = []
    for node in tree.attacks:
        attack = node.attack
        if attack.status in ("OK", "BAD_ATT_JUDGE") and not speaking_responses(node.responses):
            attack = replace(attack, status="NO_VALID_RESPONSE")
        nodes.append(AttackNode(_worth(attack), tuple(_worth(response) for response in node.responses)))
    return replace(tree, attacks=tuple(nodes))


def _worth(node: Response) -> Response:
    return replace(node, reward=node_reward(node.status, node.score))


def choose(rewards: Sequence[float | None], tie_margin: float = 0.0) -> tuple[int, int] | None:
    """Places of the highest and the lowest reward (ties: the first); `None`: they differ by `tie_margin` or less.

    >>> choose((7, 3)), choose((5, 5)), choose((4, None, 9)), choose((None, 6)), choose((-1, -1))
    ((0, 1), None, (2, 0), None, None)
    """
    valued = [(reward, i) for i, reward in enumerate(rewards) if reward is not None]
    if not valued:
        return None
    highest, w = max(valued, key=lambda pair: pair[0])
    lowest, l = min(valued, key=lambda pair: pair[0])  # noqa: E741, the paper's letter
    return (w, l) if highest - lowest > tie_margin else None


def build_pairs(tree: Tree, tie_margin: float = 0.0) -> TreePairs:
    """Make the pairs of a tree whose rewards are patched.

    Both sides of a pair answer the same prompt: attacks the seed's instruction, answers one attack.
    """
    defender = [
        pair
        for a, node in enumerate(tree.attacks)
        if (pair := _pair(node.responses, a, tie_margin)) is not None
    ]  # fmt: skip
    return TreePairs(_pair([node.attack for node in tree.attacks], None, tie_margin), tuple(defender))


def _pair(nodes: Sequence[Response], attack: int | None, tie_margin: float) -> Pair | None:
    places = choose([node.reward for node in nodes], tie_margin)
    if places is None:
        return None
    chosen, rejected = (nodes[i] for i in places)
    ids = rejected.token_ids
    if rejected.status == "MAX_LENGTH":
        # An endless sequence has a log-probability of its own order, and would dominate the sum.
        ids = ids[: len(chosen.token_ids)]
    assert chosen.reward is not None and rejected.reward is not None
    return Pair(
        attack, *places, chosen.token_ids, ids, (chosen.reward, rejected.reward), (chosen.status, rejected.status)
    )
