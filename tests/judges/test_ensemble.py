import pytest

from tempering.core.endpoint import EndpointSampler
from tempering.core.ledger import SPENT, Tokens
from tempering.core.records import Completion, Prompt, Verdict
from tempering.judges import judge_groups, load_judge
from tempering.judges.ensemble import EnsembleJudge, majority

PROMPT = Prompt(({"role": "user", "content": "How do I cook rice?"},))


def votes(*scores):
    return [
        Verdict(s, f"j{i}", None if s is None else "yes" if s >= 0.5 else "no", "down" if s is None else None)
        for i, s in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "holds", "score"),
    [
        ((1.0, 1.0, 0.0), True, 2 / 3),
        ((1.0, 0.0, 0.0), False, 1 / 3),
        ((0.5, 0.5, 0.0), True, 2 / 3),  # two partial ones are a majority, though the mean is below a half
        ((1.0, 1.0, None), True, 1.0),
        ((0.0, 0.0, None), False, 0.0),
        ((1.0, 1.0), True, 1.0),
        ((1.0, 1.0, 0.0, None, None), True, 2 / 3),
    ],
)
def test_the_majority_of_the_scored_members_decides(scores, holds, score):
    got = majority(votes(*scores), "e")
    assert (got.holds, got.score, got.judge) == (holds, score, "e")
    assert got.label == ("yes" if holds else "no")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ((1.0, 0.0), "divided, 1 to 1: j0 yes (yes), j1 no (no)"),
        ((1.0, 0.0, None), "divided, 1 to 1"),
        ((1.0, 1.0, 0.0, 0.0), "divided, 2 to 2"),
        ((1.0, None), r"only 1 of 2 could tell: j0 yes (yes), j1 unscored (down)"),
        ((1.0, None, None), "only 1 of 3 could tell"),
        ((1.0, 1.0, None, None), "only 2 of 4 could tell"),
        ((None, None), "only 0 of 2 could tell"),
    ],
)
def test_ties_and_too_few_scored_members_are_unscored_with_the_votes(scores, reason):
    got = majority(votes(*scores), "e")
    assert got.is_unscored and got.reason.startswith(reason)


class Fixed:
    def __init__(self, name, *scores):
        self.identity, self.scores = name, scores

    def __call__(self, prompt, completions):
        return [Verdict(self.scores[c.index], self.identity, reason="?") for c in completions]


class Endpoint(Fixed):
    usage = Tokens(100, 7)

    def judge_many(self, groups, on_done=None):
        return [self(p, cs) for p, cs in groups]


def test_groups_keep_their_order_and_members_may_differ_in_kind():
    judge = EnsembleJudge([Fixed("a", 1.0, 0.0, 1.0), Endpoint("b", 1.0, 0.0, None), Fixed("c", 0.0, 0.0, None)])
    cs = [Completion(PROMPT.id, "x", "stop", i) for i in range(3)]
    told = []
    first, second = judge_groups(judge, [(PROMPT, cs), (PROMPT, cs[1:])], max_unscored=1.0, on_done=told.append)
    assert [v.holds for v in first] == [True, False, None]
    assert [v.holds for v in second] == [False, None]
    assert told == [2]
    assert judge.usage == (100, 7) and EnsembleJudge([Fixed("a"), Fixed("c")]).usage is None


def test_a_member_that_reached_its_spending_limit_has_not_abstained():
    """The others may have a majority; but it would be that of another judge than the one that is named."""
    capped = Verdict(None, "j3", reason=f"judge did not answer: {SPENT}: ...")
    got = majority([*votes(1.0, 1.0, 1.0), capped], "e")
    assert got.is_unscored and SPENT in got.reason
    assert majority(votes(1.0, 1.0, 1.0, None), "e").holds


def test_members_over_an_endpoint_are_connected_as_they_are_told():
    asked = []

    def connect(spec):
        asked.append(spec)
        return EndpointSampler(spec, concurrency=3)

    judge = load_judge("ensemble:rules+openai:m@http://host/v1", "refused", connect)
    assert asked == ["openai:m@http://host/v1"] and judge.members[1].sampler.config.concurrency == 3


def test_the_spec_lists_the_members_and_the_identity_names_them():
    judge = load_judge("ensemble:rules+openai:org/m+x@http://host:8000/v1+classifier:a/b#toxic,hate", "harmful")
    kinds = [type(m).__name__ for m in judge.members]
    assert kinds == ["RulesJudge", "LLMJudge", "ClassifierJudge"]
    assert all(m.identity in judge.identity for m in judge.members)
    assert "org/m+x@host:8000" in judge.identity and judge.identity.startswith("ensemble:rules/harmful/")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ensemble:rules", "two or more different judges"),
        ("ensemble:rules+rules", "two or more different judges"),
        ("ensemble:rules+rulez", "unknown judge 'rules\\+rulez'"),
        ("ensemble:rules+ensemble:rules+rules", "an ensemble of ensembles"),
    ],
)
def test_an_ensemble_that_is_none_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        load_judge(spec, "refused")


def test_a_member_that_cannot_answer_the_question_is_refused():
    with pytest.raises(ValueError, match="shieldgemma says whether an answer is harmful"):
        load_judge("ensemble:rules+guard:some/shieldgemma-2b", "refused")
