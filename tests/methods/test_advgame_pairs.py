"""Statuses, rewards and pairs of AdvGame: the whole truth table, small enough to go through."""

from dataclasses import replace
from itertools import permutations, product

import pytest
from advgame_parts import Measuring

from tempering.core.config import build
from tempering.judges.game import GameJudge
from tempering.judges.journal import Journal
from tempering.methods.advgame.pairs import (
    LOSES,
    STATUSES,
    AttackNode,
    Response,
    Tree,
    attack_status,
    build_pairs,
    choose,
    node_reward,
    patch_rewards,
    response_status,
    speaking_responses,
)
from tempering.methods.advgame.rollout import Dealer, Judges
from tempering.methods.advgame.settings import AdvGameConfig

SCORES = {"OK": (0.0, 4.0, 9.5)}
"""Points that a node of a status may have; the others have none."""
NODES = [(status, score) for status in STATUSES for score in SCORES.get(status, (None,))]


def node(status="OK", score=None, length=3, start=0, reward=None):
    finish = {"MAX_LENGTH": "length", "PROMPT_NOT_VALID": None}.get(status, "stop")
    ids = () if finish is None else tuple(range(start, start + length))
    return Response(ids, "text", finish, "text", status, score, reward)


def tree(*attacks):
    return Tree("seed", "harmful", "how to?", tuple(attacks))


def of_answers(*answers):
    return tree(AttackNode(node("OK", 5.0), answers))


@pytest.mark.parametrize(
    ("rewards", "places"),
    [
        ((7, 3), (0, 1)), ((5, 5), None), ((0, -1), (0, 1)), ((-1, -1), None), ((None, 6), None),
        ((None, -1), None), ((4, None, 9), (2, 0)), ((9, 4, 4), (0, 1)), ((4, 4, 9), (2, 0)), ((), None),
    ],
)  # fmt: skip
def test_choose_is_the_table_of_the_specification(rewards, places):
    assert choose(rewards) == places


def test_a_tie_margin_asks_for_more_than_itself():
    assert choose((7, 5), tie_margin=2) is None and choose((7.5, 5), tie_margin=2) == (0, 1)


ATTACK_ROWS = ("MAX_LENGTH", "PARSING", "BAD_FAITH_JUDGE", "NOT_FAITHFUL", "NO_VALID_RESPONSE", "BAD_ATT_JUDGE")


def test_the_first_row_that_matches_names_an_attack():
    """All 2 x 2 x 3 x 2 x 2 ways in which an attack can go, against the order of the rows."""
    for finish, parsed, faithful, answered, scored in product(
        ("stop", "length"), (True, False), (True, None, False), (True, False), (True, False)
    ):
        holds = (finish != "stop", not parsed, faithful is None, faithful is False, not answered, not scored)
        want = next((name for name, here in zip(ATTACK_ROWS, holds, strict=True) if here), "OK")
        assert attack_status(finish, parsed, is_faithful=faithful, is_answered=answered, is_scored=scored) == want


def test_the_first_row_that_matches_names_an_answer():
    for finish, parsed, scored in product((None, "stop", "length", "error"), (True, False), (True, False)):
        holds = (finish is None, finish != "stop", not parsed, not scored)
        rows = ("PROMPT_NOT_VALID", "MAX_LENGTH", "PARSING", "BAD_DEF_JUDGE")
        want = next((name for name, here in zip(rows, holds, strict=True) if here), "OK")
        assert response_status(finish, parsed, is_scored=scored) == want


def test_every_status_has_the_reward_of_the_table():
    want = {s: -1.0 for s in ("MAX_LENGTH", "PARSING", "NOT_FAITHFUL")} | {"OK": 6.0}
    for status in STATUSES:
        assert node_reward(status, 6.0) == want.get(status), status
    assert node_reward("OK", None) == 0.0  # that judge is off


def test_pairs_over_all_combinations_of_statuses():
    """None is in no pair; -1 is only ever the loser; a pair is kept iff the rewards differ."""
    for group in product(NODES, repeat=3):
        answers = [node(status, score, start=10 * i) for i, (status, score) in enumerate(group)]
        patched = patch_rewards(of_answers(*answers))
        rewards = [node_reward(*each) for each in group]
        assert [r.reward for r in patched.attacks[0].responses] == rewards
        pairs = build_pairs(patched).defender
        valued = [r for r in rewards if r is not None]
        assert len(pairs) == (len(set(valued)) > 1)
        for pair in pairs:
            assert (pair.rewards[0], pair.rewards[1]) == (max(valued), min(valued))
            assert pair.rewards[0] > -1 and pair.statuses[0] == "OK"
            assert pair.statuses[1] == "OK" or pair.statuses[1] in LOSES
            assert rewards[pair.chosen] == pair.rewards[0] and rewards[pair.rejected] == pair.rewards[1]
            assert pair.chosen_ids == answers[pair.chosen].token_ids and pair.attack == 0


def test_relabelling_the_samples_changes_nothing_but_ties():
    for group in product(NODES, repeat=3):
        rewards = [node_reward(*each) for each in group]
        for order in permutations(range(3)):
            moved = choose([rewards[i] for i in order])
            found = choose(rewards)
            assert (moved is None) == (found is None)
            if moved and found:
                assert [rewards[order[i]] for i in moved] == [rewards[i] for i in found]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("length", [2, 3, 7])
def test_only_an_endless_loser_is_cut_to_the_length_of_the_winner(status, length):
    pairs = build_pairs(patch_rewards(of_answers(node("OK", 8.0, length=3), node(status, 1.0, length, start=50))))
    for pair in pairs.defender:
        kept = min(3, length) if status == "MAX_LENGTH" else length
        assert pair.rejected_ids == tuple(range(50, 50 + kept)) and pair.chosen_ids == (0, 1, 2)
    assert bool(pairs.defender) == (status == "OK" or status in LOSES)


def test_an_attack_is_judged_by_its_best_answer_its_first_or_all():
    answers = [node("MAX_LENGTH"), node("OK", 4.0), node("OK", 9.0), node("OK", 9.0), node("BAD_DEF_JUDGE")]
    spoken = {"optimistic": [2], "first": [1], "mean": [1, 2, 3]}
    assert {speaker: speaking_responses(answers, speaker) for speaker in spoken} == spoken
    without_judge = [replace(a, score=None) for a in answers]
    assert speaking_responses(without_judge, "optimistic") == [1]
    for speaker in spoken:
        assert not speaking_responses([node("MAX_LENGTH"), node("BAD_DEF_JUDGE"), node("PROMPT_NOT_VALID")], speaker)


@pytest.mark.parametrize("singletons", [True, False])
@pytest.mark.parametrize("kind", ["pointwise", "pairwise"])
@pytest.mark.parametrize(
    ("speaker", "points"), [("optimistic", (4.0, 8.0)), ("first", (2.0, 6.0)), ("mean", (3.0, 6.0))]
)
def test_the_points_of_an_attack_are_those_of_the_answers_that_speak_for_it(
    speaker, points, kind, singletons, tmp_path
):
    """Answers are worth their length, here to both players; an endless one never speaks."""

    def answer(length, finish="stop"):
        return Response((1,), "x" * length, finish, "x" * length, "OK" if finish == "stop" else "MAX_LENGTH")

    own = {"attacker_response": speaker, "kind": kind, "order": "off", "judge_singletons": singletons}
    config, journal = build(AdvGameConfig, {"judges": own}, "a test"), Journal(tmp_path / "judged.jsonl")
    judge = GameJudge(Measuring(), kind=kind, order="off", judge_singletons=singletons, journal=journal)
    attacks = [(answer(2), answer(9, "length"), answer(4)), (answer(6), answer(4), answer(8)), (answer(9, "length"),)]
    asked = tuple(AttackNode(Response((1,), "x", "stop", "x"), responses) for responses in attacks)
    (graded,) = Dealer(config, None, Judges(judge, judge, judge), None).grade([Tree("s", "harmful", "seed", asked)])
    if speaker == "mean" and not singletons:
        points = (3.0, 5.0)  # the third answer has no other to be compared with: (6 + 4) / 2
    assert [attack.attack.reward for attack in graded.attacks] == [*points, None]
    assert graded.attacks[2].attack.status == "NO_VALID_RESPONSE"


def test_attacks_are_compared_by_one_answer_each_at_a_time(tmp_path):
    """Three answers to each of two attacks are three comparisons, not fifteen."""

    def answer(i, j):
        return Response((1,), f"answer {i} {j}", "stop", f"answer {i} {j}")

    asker = Measuring()
    judge = GameJudge(asker, kind="pairwise", order="off", journal=Journal(tmp_path / "judged.jsonl"))
    config = build(AdvGameConfig, {"judges": {"attacker_response": "mean"}}, "a test")
    nodes = tuple(
        AttackNode(Response((1,), "x", "stop", "x"), tuple(answer(i, j) for j in range(3))) for i in range(2)
    )
    Dealer(config, None, Judges(judge, None, judge), None).grade([Tree("s", "harmful", "seed", nodes)])
    assert sorted(question.responses for question in asker.asked) == [
        (f"answer 0 {j}", f"answer 1 {j}") for j in range(3)
    ]


@pytest.mark.parametrize("status", [s for s in STATUSES if s != "OK"])
def test_an_attack_without_a_valid_answer_is_neither_won_nor_lost(status):
    answered = AttackNode(node("OK", 3.0), (node("OK", 5.0), node("OK", 6.0)))
    unanswered = AttackNode(node("OK", 10.0), (node(status), node(status)))
    patched = patch_rewards(tree(answered, unanswered))
    assert patched.attacks[1].attack.status == "NO_VALID_RESPONSE"
    pairs = build_pairs(patched)
    assert pairs.attacker is None and [pair.attack for pair in pairs.defender] == [0]


def test_two_attacks_with_two_answers_make_at_most_one_and_two_pairs():
    answers = (node("OK", 5.0), node("OK", 6.0))
    pairs = build_pairs(
        patch_rewards(tree(AttackNode(node("OK", 3.0), answers), AttackNode(node("OK", 4.0), answers)))
    )
    assert pairs.attacker is not None and (pairs.attacker.chosen, pairs.attacker.rejected) == (1, 0)
    assert pairs.attacker.attack is None and len(pairs.defender) == 2


def test_without_a_judge_of_attacks_only_validity_makes_pairs():
    answers = (node("OK", 5.0),)
    valid, other = AttackNode(node("OK"), answers), AttackNode(node("OK"), answers)
    assert build_pairs(patch_rewards(tree(valid, other))).attacker is None
    pair = build_pairs(patch_rewards(tree(valid, AttackNode(node("PARSING"))))).attacker
    assert pair is not None and pair.rewards == (0.0, -1.0)
