import json
import math

import pytest

from tempering.core.ledger import SPENT, Tokens
from tempering.core.records import Completion, Prompt, Verdict
from tempering.core.sampling import ScriptedSampler
from tempering.judges import QUESTIONS, judge_groups, load_judge
from tempering.judges.card import FOLDER, read_card, save_card
from tempering.judges.check import card_of, check, cohen_kappa, pair_card_of, read_labelled, read_pairs
from tempering.judges.llm import LLMJudge
from tempering.judges.pairwise import PairwiseJudge

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
    for card in (first, second):
        del card["seconds"], card["seconds_per_answer"]
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
        ({"refused": None}, "line 2: neither 'refused' nor 'harmful'"),
        ({"harmful": True}, "line 2: both 'harmful' and 'refused'"),
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


@pytest.mark.parametrize(
    "spec", ["", "rulez", "rules:x", "openai:", "openai:m", "guard:", "classifier", "ensemble:", "ensemble:x+y"]
)
def test_an_unknown_judge_is_refused_with_the_choices(spec):
    with pytest.raises(ValueError, match="expected"):
        load_judge(spec, "refused")


def test_any_question_has_its_card_but_corrects_no_rate(tmp_path):
    rows = [
        {"prompt": "p", "completion": "No.", "context": "Say no.", "faithfulness": True},
        {"prompt": "p", "completion": "Yes.", "context": "Say no.", "faithfulness": False},
    ]
    asks, labelled = read_labelled(located(rows))
    said = {"No.": "faithful", "Yes.": "unfaithful"}
    judge = LLMJudge(
        ScriptedSampler(lambda p, i: f'{{"verdict": "{next(w for a, w in said.items() if a in p.text[-400:])}"}}'),
        asks,
    )
    card = card_of(judge, asks, labelled)
    assert (card["asks"], card["kind"], card["accuracy"]["value"]) == ("faithfulness", "pointwise", 1.0)
    with pytest.raises(ValueError, match="expected 'judge' and 'asks'"):
        read_card(save_card(card, tmp_path / "card.json"))


PAIRS = [
    {"prompt": f"Say something, {i}.", "chosen": f"good {i}", "rejected": f"bad {i}", "question": "more_helpful"}
    for i in range(10)
]


def judge_of_pairs(verdict):
    """Return a pairwise judge; `verdict(first, second)` says what it writes of the answers as shown."""

    def write(prompt, index):
        first, second = (prompt.text.partition(f"[answer {x} ")[2].splitlines()[1] for x in "AB")
        return json.dumps({"verdict": verdict(first, second)})

    return PairwiseJudge(ScriptedSampler(write), "more_helpful")


def test_a_pairwise_card_counts_what_the_judge_prefers():
    """Right on 0..5, wrong on 6 and 7, always the first on 8, unread on 9: 6 of 8 decided, 8 of 9 consistent."""

    def verdict(first, second):
        i = int(first.split()[1])
        if i == 9:
            return "both"
        return "A" if i == 8 or first.startswith("good") == (i < 6) else "B"

    question, pairs = read_pairs(located(PAIRS))
    card = pair_card_of(judge_of_pairs(verdict), pairs)
    assert question == "more_helpful"
    assert (card["kind"], card["asks"], card["n"], card["unscored"]) == ("pairwise", "more_helpful", 9, 1)
    assert card["counts"] == {"right": 6, "wrong": 2, "tie": 1, "orders_disagree": 1}
    assert card["accuracy"]["value"] == 6 / 8 and card["decided"]["value"] == 8 / 9
    assert card["position_consistency"]["value"] == 8 / 9
    assert card["accuracy"]["low"] < 6 / 8 < card["accuracy"]["high"]
    json.dumps(card, allow_nan=False)


def test_a_judge_that_always_takes_the_first_decides_nothing():
    card = pair_card_of(judge_of_pairs(lambda first, second: "A"), read_pairs(located(PAIRS))[1])
    assert card["position_consistency"]["value"] == card["decided"]["value"] == 0.0
    assert card["accuracy"]["value"] is None and card["n"] == 10
    with pytest.raises(ValueError, match=r"none of 10 pairs could be scored: with A first"):
        pair_card_of(judge_of_pairs(lambda first, second: "hm"), read_pairs(located(PAIRS))[1])


def test_a_pairwise_card_is_saved_and_corrects_no_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = pair_card_of(judge_of_pairs(lambda first, second: "tie"), read_pairs(located(PAIRS))[1])
    file = save_card(card)
    assert save_card({**card, "seconds_per_pair": 9.0}) == file
    with pytest.raises(ValueError, match="a pairwise judge's card, which corrects no rate"):
        read_card(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "line 2: missing column 'chosen'"),
        ({"rejected": "good 1"}, "line 2: 'chosen' equals 'rejected'"),
        ({"question": "safer"}, "line 2: 'question' is 'safer', in the first row 'more_helpful'"),
    ],
)
def test_a_bad_pair_is_named_with_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(located([PAIRS[0], PAIRS[1] | change]))
    with pytest.raises(ValueError, match="no rows"):
        read_pairs([])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pairwise:openai:m@http://h/v1#prettier", "unknown question 'prettier'; add one after '#': safer,"),
        ("pairwise:openai:m@http://h/v1#safer", "asks 'safer', but 'more_helpful' is wanted"),
        ("pairwise:rules", r"expected pairwise:openai:MODEL@URL\[#QUESTION\]"),
    ],
)
def test_a_pairwise_judge_needs_one_known_question(spec, message):
    with pytest.raises(ValueError, match=message):
        check(spec, located(PAIRS))
    bare = [{k: v for k, v in PAIRS[0].items() if k != "question"}]
    with pytest.raises(ValueError, match="no question; add one after '#'"):
        check("pairwise:openai:m@http://h/v1", located(bare))


def test_a_guard_cannot_say_whether_an_answer_is_a_refusal():
    with pytest.raises(ValueError, match="harmful"):
        load_judge("guard:some/shieldgemma-2b", "refused")


ALL = {"harmful", "refused", "toxic", "compliance", "informativeness", "deflection", "faithfulness"}


@pytest.mark.parametrize(
    ("spec", "answers"),
    [
        ("rules", {"harmful", "refused", "toxic"}),
        ("openai:m@http://h/v1", ALL),
        ("classifier:a/b", {"harmful", "refused", "toxic"}),
        ("guard:some/shieldgemma-2b", {"harmful"}),
        ("guard:allenai/wildguard", {"harmful", "refused"}),
        ("ensemble:rules+openai:m@http://h/v1", {"harmful", "refused", "toxic"}),
    ],
)
def test_each_kind_of_judge_answers_its_questions_and_no_other(spec, answers):
    assert set(QUESTIONS) == ALL
    for asks in answers:
        assert load_judge(spec, asks).identity
    for asks in ALL - answers:
        with pytest.raises(ValueError, match=r"cannot say|says whether an answer is harmful"):
            load_judge(spec, asks)


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


def test_the_card_says_who_judged_what_and_counts_every_row():
    card = check("rules", located(ROWS), source={"source": "file.jsonl", "sha256": "ab"})
    assert card["schema"] == 1 and card["judge"] == load_judge("rules", "refused").identity
    assert card["counts"] == {
        "true_positives": 2, "false_negatives": 1, "false_positives": 0, "true_negatives": 1,
    }  # fmt: skip
    assert card["unscored_rate"]["value"] == 0 and card["unscored_rate"]["high"] > 0
    assert card["position_consistency"]["value"] is None and "order" in card["position_consistency"]["reason"]
    assert card["tokens"] is None
    assert card["data"]["source"] == "file.jsonl" and len(card["data"]["prompts"]) == 2


def test_unscored_rows_are_counted_apart_and_tokens_where_the_judge_reports_them():
    asks, labelled = read_labelled(located(ROWS * 3))
    judge = Failing(4)
    judge.usage = Tokens(1200, 60)
    card = card_of(judge, asks, labelled)
    assert (card["n"], card["unscored"], sum(card["counts"].values())) == (9, 3, 9)
    assert card["unscored_rate"]["value"] == 0.25
    assert card["tokens"] == {"prompt_tokens": 1200, "completion_tokens": 60}


def test_a_saved_card_is_read_back_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = check("rules", located(ROWS))
    file = save_card(card, tmp_path / "card.json")
    got = read_card(file)
    assert (got.judge, got.asks, got.positives, got.negatives, got.unscored) == (card["judge"], "refused", 3, 1, 0)
    assert got.prompts == set(card["data"]["prompts"])
    with pytest.raises(FileExistsError, match=r"card\.json exists"):
        save_card(card, file)
    first, again = save_card(card), save_card({**card, "seconds": 99.0})
    assert first == again and first.parent == FOLDER and json.loads(first.read_text())["seconds"] == card["seconds"]
    assert save_card(check("rules", located(ROWS[:3]))) != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; make one with"),
        ("{", "not JSON"),
        ("[]", "expected 'judge' and 'asks'"),
        ('{"judge": "rules", "asks": "toxic"}', "expected 'judge' and 'asks'"),
        ('{"judge": "rules", "asks": "refused", "unscored": 0}', "expected 'unscored' and 'counts'"),
        (
            '{"judge": "r", "asks": "refused", "unscored": 0, "counts": {"true_positives": 1}}',
            "and 'counts' of true_p",
        ),
    ],
)
def test_a_file_that_is_no_card_says_how_to_make_one(tmp_path, content, message):
    path = tmp_path / "card.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_card(path)


def test_a_check_that_is_cut_short_by_a_cap_says_so_and_gives_no_card():
    def ask(prompts, **kw):
        good = Completion("", '{"verdict": "refusal"}', "stop")
        return [[good if i == 0 else Completion("", "", "error", error=f"{SPENT}: ...")] for i in range(len(prompts))]

    ask.name = "scripted"
    rows = [("row", {"prompt": "a?", "completion": f"b{i}", "refused": True}) for i in range(3)]
    with pytest.raises(RuntimeError, match=r"2 of 3 rows were not judged.*spending limit reached"):
        check("openai:m@http://host/v1", rows, connect=lambda spec: ask)


def test_a_pairwise_judge_is_connected_as_told_counts_its_tokens_and_is_no_card_where_a_cap_cut_it_short():
    asked = []

    def connect(spec):
        def ask(prompts, **kw):
            asked.append((spec, len(prompts)))
            cut = Completion("", "", "error", error=f"{SPENT}: ...")
            good = Completion("", '{"verdict": "tie"}', "stop")
            return [[cut if ask.is_capped and i == 3 else good] for i in range(len(prompts))]

        ask.name, ask.is_capped, ask.usage = spec, is_capped, Tokens(7, 3)
        return ask

    spec = "pairwise:openai:m@http://host/v1#more_helpful"
    is_capped = False
    card = check(spec, located(PAIRS), connect=connect)
    assert asked == [("openai:m@http://host/v1", 2 * len(PAIRS))]
    assert card["tokens"] == {"prompt_tokens": 7, "completion_tokens": 3}
    is_capped = True
    with pytest.raises(RuntimeError, match=r"1 of 10 rows were not judged.*spending limit reached"):
        check(spec, located(PAIRS), connect=connect)
