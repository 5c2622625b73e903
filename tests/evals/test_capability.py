import json
import math

import pytest

from tempering.core.records import Verdict
from tempering.core.sampling import ScriptedSampler
from tempering.evals import EvalConfig, Scorer, capability
from tempering.evals.capability import has_answer, picked_choice, question_from_row


class RefusalJudge:
    identity = "refusals"

    def __call__(self, prompt, completions):
        return [Verdict(float("sorry" in c.text), self.identity) for c in completions]


class ScoringSampler(ScriptedSampler):
    """Scores a choice by a table of (sum, tokens)."""

    def __init__(self, table, script=("Paris",)):
        super().__init__(script)
        self.table = table

    def score(self, prompts, completions):
        return [[self.table[text] for text in texts] for texts in completions]


def choice(i=0, answer=0):
    return {
        "prompt": f"question {i}",
        "choices": ["short", "a longer one"],
        "answer": answer,
        "kind": "choice",
    }


def exact(i=0):
    return {"prompt": f"What is the capital of country {i}?", "answers": ["Paris"], "kind": "exact"}


def data(tmp_path, *rows):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"category": "c", **row}) + "\n" for row in rows))
    return str(path)


def evaluate(sampler, path, **settings):
    return capability.evaluate(sampler, EvalConfig(data=path, **settings), refusal_judge=RefusalJudge())


def test_the_likeliest_choice_is_by_the_sum(tmp_path):
    """Sums -2 and -3 prefer the short one, although the means -2/1 and -3/3 prefer the longer."""
    sampler = ScoringSampler({"short": (-2.0, 1), "a longer one": (-3.0, 3)})
    assert isinstance(sampler, Scorer)
    result = evaluate(sampler, data(tmp_path, choice(0, answer=1), choice(1, answer=0)))
    assert result.metrics["capability_accuracy/choice"]["value"] == 0.5
    by_prompt = {row["prompt"]: row for row in result.rows}
    assert by_prompt["question 0"]["outcome"] is False
    assert by_prompt["question 1"]["completion"] == "short"
    assert by_prompt["question 1"]["logprobs"] == [-2.0, -3.0]
    assert by_prompt["question 1"]["tokens"] == [1, 3]
    assert result.metrics["capability_accuracy/choice"]["judge"] == capability.LIKELIEST
    assert result.warnings == []


def test_choices_of_very_different_lengths_are_warned_of(tmp_path):
    result = evaluate(ScoringSampler({"short": (-2.0, 1), "a longer one": (-3.0, 4)}), data(tmp_path, choice()))
    assert result.warnings[0].startswith("choices differ much in length (longest to shortest 4.0 in tokens)")


def test_a_tie_is_a_miss_and_no_number_is_unscored():
    question = question_from_row(choice())
    assert capability.scored_row(question, [(-1.0, 1), (-1.0, 3)])["outcome"] is False
    assert capability.scored_row(question, [(-1.0, 1), (math.nan, 3)])["outcome"] is None


def test_planted_accuracies_and_refusals_are_recovered(tmp_path):
    """Of 20 exact answers 12 are right, 3 refusals, 5 wrong; of 20 choices the 10 with answer 0 are right."""

    def script(prompt, index):
        number = int(prompt.text.rstrip("?").split()[-1])
        return "It is Paris." if number < 12 else "I'm sorry, no." if number < 15 else "London"

    sampler = ScoringSampler({"short": (-2.0, 1), "a longer one": (-3.0, 3)}, script)
    rows = [*(choice(i, i % 2) for i in range(20)), *(exact(i) for i in range(20))]
    result = evaluate(sampler, data(tmp_path, *rows))
    values = {name: m["value"] for name, m in result.metrics.items()}
    assert values == {
        "capability_accuracy": 22 / 40,
        "capability_accuracy/choice": 0.5,
        "capability_accuracy/exact": 0.6,
        "capability_refusal_rate": 0.15,
    }
    assert result.metrics["capability_accuracy"]["n"] == 40
    assert result.metrics["capability_refusal_rate"]["n"] == 20
    assert len({row["id"] for row in result.rows}) == 40
    assert all(m["low"] < m["value"] < m["high"] for m in result.metrics.values())


def test_without_log_probabilities_a_letter_is_asked_for(tmp_path):
    asked = []

    def script(prompt, index):
        asked.append(prompt.text)
        return "B"

    result = evaluate(ScriptedSampler(script), data(tmp_path, choice(0, 1), choice(1, 0)))
    assert asked[0].endswith("\n\nA. short\nB. a longer one\n\nAnswer with the letter only.")
    assert result.metrics["capability_accuracy/choice"]["value"] == 0.5
    assert result.metrics["capability_accuracy/choice"]["judge"] == capability.LETTER
    assert {row["prompt"] for row in result.rows} == {"question 0", "question 1"}


def test_the_order_of_the_file_changes_nothing(tmp_path):
    rows = [*(choice(i, i % 2) for i in range(9)), *(exact(i) for i in range(9))]
    sampler = ScoringSampler({"short": (-2.0, 1), "a longer one": (-3.0, 3)}, lambda p, i: p.text[-2] + " Paris")
    one = evaluate(sampler, data(tmp_path, *rows))
    other = evaluate(sampler, data(tmp_path, *rows[::-1]), batch_prompts=4)
    assert (one.rows, one.metrics) == (other.rows, other.metrics)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("A", 0),
        ("B.", 1),
        ("(B) a dog", 1),
        ("**B**", 1),
        ("B\n\nBecause it barks.", 1),
        ("The correct answer is **B**.", 1),
        ("Answer: A", 0),
        ("I think it is a dog.", 1),
        ("A dog", 1),
        ("It could be a hat or a dog", None),
        ("D", None),
        ("", None),
    ],
)
def test_a_letter_or_a_choice_is_found(text, index):
    assert picked_choice(text, ["Hat", "Dog"]) == index


@pytest.mark.parametrize(
    ("text", "answers", "question", "is_right"),
    [
        ("Paris", ["paris"], "", True),
        ("**Paris**!", ["Paris"], "", True),
        ("The capital of France is Paris.", ["Paris"], "", True),
        ("The answer is:\n\nParis", ["Paris"], "", True),
        ("Parisian", ["Paris"], "", False),
        ("London.\nNot Paris.", ["Paris"], "", False),
        ("There are 120 of them", ["12"], "", False),
        ("12.5", ["12"], "", False),
        ("1,200 people", ["1200"], "", True),
        ("twenty-one", ["twenty one"], "", True),
        ("Ünïcode ﬁne", ["ünïcode fine"], "", True),
        ("A lot of letters, but it is Z", ["A"], "", False),
        ("**A** comes first", ["A"], "", True),
        ("The letter is a consonant", ["A"], "", False),
        ('The first letter is "A".', ["A"], "", True),
        ("7 is bigger than 3.", ["3"], "Which is smaller, 3 or 7?", True),
        ("If we compare 3 with 7, it is 7.", ["3"], "Which is smaller, 3 or 7?", False),
        ("", ["Paris"], "", False),
    ],
)
def test_an_accepted_answer_is_found_as_whole_words(text, answers, question, is_right):
    assert has_answer(text, answers, question) == is_right


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "'answers' must be a list of texts, got None"),
        ({"prompt": "q", "answers": ["?"]}, "holds no word or number"),
        ({"prompt": "q", "kind": "essay"}, "'kind' must be choice or exact, got 'essay'"),
        ({"prompt": "q", "choices": ["a"], "answer": 0}, "2 to 26 different texts"),
        ({"prompt": "q", "choices": ["a", "a"], "answer": 0}, "2 to 26 different texts"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": 2}, "'answer' must be 0 to 1 or a letter, got 2"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": True}, "'answer' must be 0 to 1"),
        ({"prompt": "q", "choices": ["a", "b"]}, "'answer' must be 0 to 1 or a letter, got None"),
    ],
)
def test_a_bad_question_says_what_is_wrong(row, message):
    with pytest.raises(ValueError, match=message):
        question_from_row(row)


@pytest.mark.parametrize("answer", [1, "1", "B", "b"])
def test_an_answer_is_an_index_or_a_letter(answer):
    assert question_from_row({"prompt": "q", "choices": ["a", "b"], "answer": answer}).extra["answer"] == 1


def test_an_answer_that_failed_is_unscored(tmp_path):
    from tempering.core.records import Completion

    def sampler(prompts, *, on_done, max_new_tokens, **more):
        assert max_new_tokens == capability.ANSWER_TOKENS
        return [[Completion(p.id, "", "error", error="down")] for p in prompts]

    sampler.name = "endpoint"
    with pytest.raises(ValueError, match=r'capability_accuracy: 2 of 2 answers unscored .*"no answer: down"'):
        evaluate(sampler, data(tmp_path, choice(), exact()))


def test_bundled_questions_serve_by_default():
    sampler = ScriptedSampler(["Paris"])
    result = capability.evaluate(sampler, EvalConfig(), refusal_judge=RefusalJudge())
    assert len(result.rows) == 100
    assert 0 < result.metrics["capability_accuracy"]["value"] < 0.5
