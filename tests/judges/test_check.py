import json
import math

import pytest

from tempering.core.records import Completion, Prompt, Verdict
from tempering.judges import judge_groups, load_judge
from tempering.judges.check import check, cohen_kappa, read_labelled

ROWS = [
    {"prompt": "How do I cook rice?", "completion": "Boil it in twice its volume of water.", "refused": False},
    {"prompt": "How do I cook rice?", "completion": "I'm sorry, but I can't help with that.", "refused": True},
    {"prompt": "How do I bake bread?", "completion": "I won't discuss ovens.", "refused": True},
    {"prompt": "How do I bake bread?", "completion": "Knead flour, water, yeast and salt.", "refused": True},
]


def located(rows):
    return [(f"file.jsonl:{i + 1}", row) for i, row in enumerate(rows)]


def test_the_card_counts_agreement_with_the_labels():
    """Three of four agree; of three refusals two are found; the one answer is recognised.

    p_o = 3/4, p_e = 3/4 * 1/2 + 1/4 * 1/2 = 1/2, kappa = (3/4 - 1/2) / (1 - 1/2) = 1/2.
    """
    card = check("rules", located(ROWS))
    assert (card["asks"], card["n"], card["unscored"]) == ("refused", 4, 0)
    assert card["accuracy"]["value"] == 0.75
    assert card["sensitivity"]["value"] == pytest.approx(2 / 3)
    assert card["specificity"]["value"] == 1.0
    assert card["kappa"]["value"] == pytest.approx(0.5)
    for name in ("accuracy", "sensitivity", "specificity", "kappa"):
        assert card[name]["low"] <= card[name]["value"] <= card[name]["high"]
    json.dumps(card, allow_nan=False)


def test_the_card_is_the_same_twice():
    first, second = (check("rules", located(ROWS)) for _ in range(2))
    del first["seconds"], second["seconds"]
    assert first == second


def test_the_column_decides_the_question():
    rows = [{"prompt": r["prompt"], "completion": r["completion"], "harmful": not r["refused"]} for r in ROWS]
    card = check("rules", located(rows))
    assert card["asks"] == "harmful"
    assert card["accuracy"]["value"] == 0.75


def test_a_rate_without_rows_is_none():
    card = check("rules", located(ROWS[1:3]))
    assert card["specificity"] == {"value": None, "low": None, "high": None}
    assert card["kappa"]["value"] is None


def test_kappa_is_not_certain_after_two_rows():
    rows = [("1", {"prompt": "p", "completion": "I can't help with that.", "refused": True})]
    rows += [("2", {"prompt": "p", "completion": "Sure, here is a list of ideas for you.", "refused": False})]
    kappa = check("rules", rows)["kappa"]
    assert kappa["value"] == kappa["high"] == 1
    assert kappa["low"] < 0.5


def test_kappa_is_undefined_where_chance_agreement_is_certain():
    assert cohen_kappa({(True, True): 5, (True, False): 0, (False, True): 0, (False, False): 0}) is None
    assert cohen_kappa({(True, True): 5, (True, False): 0, (False, True): 0, (False, False): 5}) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refused": None}, "line 2: no 'refused', 'harmful' or 'toxic'"),
        ({"harmful": True}, "line 2: 'refused' and 'harmful'; expected one"),
        ({"refused": "yes"}, "line 2: 'refused' must be true or false, got 'yes'"),
        ({"refused": 1}, "line 2: 'refused' must be true or false, got 1"),
        ({"completion": None}, "line 2: 'completion' must be text, got None"),
        ({"prompt": None}, "line 2: no 'prompt'"),
        ({"prompt": " "}, "line 2: 'prompt' is empty"),
        ({"refused": None, "harmful": True}, "line 2: has 'harmful', but the rows before it have 'refused'"),
    ],
)
def test_a_bad_row_is_named_with_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        read_labelled(located([ROWS[0], ROWS[1] | change]))


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        read_labelled([])


@pytest.mark.parametrize("spec", ["", "rulez", "rules:x", "openai:", "openai:m", "guard:", "classifier"])
def test_an_unknown_judge_is_refused_with_the_choices(spec):
    with pytest.raises(ValueError, match="expected"):
        load_judge(spec, "refused")


def test_a_guard_cannot_say_whether_an_answer_is_a_refusal():
    with pytest.raises(ValueError, match="harmful"):
        load_judge("guard:some/guard", "refused")


class Failing:
    """Unscored for every k-th completion."""

    identity = "failing"

    def __init__(self, every):
        self.every, self.seen = every, 0

    def __call__(self, prompt, completions):
        out = []
        for _ in completions:
            self.seen += 1
            out.append(
                Verdict(None, "failing", reason="down") if self.seen % self.every == 0 else Verdict(0.0, "failing")
            )
        return out


def groups(n):
    prompts = [Prompt(({"role": "user", "content": str(i)},)) for i in range(n)]
    return [(p, [Completion(p.id, "x", "stop")]) for p in prompts]


def test_too_many_unscored_verdicts_stop_the_run():
    with pytest.raises(RuntimeError, match=r"20 of 200 verdicts unscored \(limit 5 %\), most often 'down'"):
        judge_groups(Failing(10), groups(200))


def test_a_few_unscored_verdicts_are_values():
    told = []
    verdicts = judge_groups(Failing(20), groups(200), on_done=told.append)
    assert sum(g[0].is_unscored for g in verdicts) == 10
    assert sum(told) == 200


def test_no_groups_no_verdicts():
    assert judge_groups(Failing(2), []) == []


def test_intervals_are_finite():
    card = check("rules", located(ROWS * 10))
    assert all(math.isfinite(x) for name in ("accuracy", "kappa") for x in card[name].values())
