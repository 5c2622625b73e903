import json
import math

import pytest

from tempering.core.records import Completion
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.evals import EvalConfig, failed_gates, knowledge, run_eval
from tempering.evals.knowledge import ask, chance_of, item_from_row, read_option

OPTIONS = ["red", "green", "blue", "a long shade of grey"]


class ScoringSampler(ScriptedSampler):
    """Scores an answer by a function of (prompt, text) -> nats; a text has as many tokens as words."""

    def __init__(self, score):
        super().__init__(["?"])
        self.one = score
        self.asked = []

    def score(self, prompts, completions):
        self.asked += [p.text for p in prompts]
        return [
            [(self.one(p, t), len(t.split())) for t in texts] for p, texts in zip(prompts, completions, strict=True)
        ]


def item(i=0, answer=1, options=OPTIONS, **more):
    return {"question": f"which colour {i}?", "choices": options, "answer": answer, **more}


def data(tmp_path, *rows):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(sampler, path, **settings):
    return knowledge.evaluate(sampler, EvalConfig(data=path, **settings))


def always(letter):
    return lambda prompt, text: 0.0 if text.strip() == letter else -1.0


def test_a_planted_accuracy_is_recovered_raw_and_above_chance(tmp_path):
    """Always B; of 20 questions with 4 options 15 have answer 1: .75, and (.75 - .25) / .75 = 2/3 above chance."""
    rows = [item(i, 1 if i < 15 else 2) for i in range(20)]
    result = evaluate(ScoringSampler(always("B")), data(tmp_path, *rows))
    raw, above = (result.metrics[name] for name in ("knowledge_accuracy", "knowledge_accuracy/chance_corrected"))
    assert raw["value"] == 0.75
    assert above["value"] == pytest.approx(2 / 3)
    for end in ("low", "high"):
        assert above[end] == pytest.approx((raw[end] - 0.25) / 0.75)
    assert (above["n"], above["judge"]) == (20, "likeliest letter")
    assert result.details == {"chance": 0.25, "letters": {"B": 20}}
    assert "knowledge_unparsed_rate" not in result.metrics


def test_below_chance_is_negative_and_remarked(tmp_path):
    result = evaluate(ScoringSampler(always("A")), data(tmp_path, *(item(i) for i in range(40))))
    above = result.metrics["knowledge_accuracy/chance_corrected"]
    assert above["value"] == pytest.approx(-1 / 3)
    assert above["low"] <= above["value"] < above["high"] < 0
    assert result.warnings[0].startswith("accuracy is below chance (0.25)")


def test_chance_is_the_mean_over_the_questions_own_numbers_of_options(tmp_path):
    """Two questions with 2 options, two with 4: c = .375. Three of four right: (.75 - .375) / .625 = .6.

    Rows average to it: right among two (1 - .5) / .625 = .8, among four 1.2, wrong among four -.4.
    """
    rows = [item(0, 1, ["x", "y"]), item(1, 1, ["x", "y"]), item(2, 1), item(3, 0)]
    result = evaluate(ScoringSampler(always("B")), data(tmp_path, *rows))
    assert result.metrics["knowledge_accuracy/chance_corrected"]["value"] == pytest.approx(0.6)
    adds = sorted(row["outcomes"]["knowledge_accuracy/chance_corrected"] for row in result.rows)
    assert adds == pytest.approx([-0.4, 0.8, 0.8, 1.2])
    assert sum(adds) / 4 == pytest.approx(0.6)
    assert chance_of(result.rows) == 0.375


def test_letters_are_asked_below_the_listed_options(tmp_path):
    sampler = ScoringSampler(always("B"))
    evaluate(sampler, data(tmp_path, item()))
    assert sampler.asked == [
        "which colour 0?\n\nA. red\nB. green\nC. blue\nD. a long shade of grey\n\nAnswer with the letter only."
    ]


def test_options_own_texts_by_sum_and_by_mean(tmp_path):
    """Sums -2 for one word, -6 for five: the sum prefers `red`, the mean (-2, -1.2) the long one."""
    sampler = ScoringSampler(lambda p, t: -6.0 if " " in t else -2.0 if t == "red" else -9.0)
    path = data(tmp_path, item(0, 0), item(1, 3))
    picked = {}
    for way in ("sum", "mean"):
        result = evaluate(sampler, path, option_score=way)
        picked[way] = {row["completion"] for row in result.rows}
        assert result.metrics["knowledge_accuracy"]["value"] == 0.5
    assert picked == {"sum": {"red"}, "mean": {"a long shade of grey"}}
    assert set(sampler.asked) == {"which colour 0?", "which colour 1?"}


def test_a_tie_is_a_miss_and_no_number_is_unscored(tmp_path):
    tie = evaluate(ScoringSampler(lambda p, t: 0.0), data(tmp_path, item()))
    assert (tie.rows[0]["outcome"], tie.rows[0]["letter"]) == (False, None)
    with pytest.raises(ValueError, match="knowledge_accuracy: 1 of 1 answers unscored"):
        evaluate(ScoringSampler(lambda p, t: math.nan), data(tmp_path, item()))


def test_shuffling_averages_out_a_liking_for_one_letter(tmp_path):
    """All answers stand at B. Who always picks B is all right as they stand, and at chance once they are permuted."""
    path = data(tmp_path, *(item(i) for i in range(400)))
    sampler = ScoringSampler(always("B"))
    assert evaluate(sampler, path).metrics["knowledge_accuracy"]["value"] == 1.0
    shuffled = evaluate(sampler, path, shuffle=True)
    assert 0.19 < shuffled.metrics["knowledge_accuracy"]["value"] < 0.31
    assert shuffled.rows == evaluate(sampler, path, shuffle=True, batch_prompts=7).rows
    assert shuffled.rows != evaluate(sampler, path, shuffle=True, seed=1).rows


def test_shuffling_changes_nothing_for_who_knows(tmp_path):
    def knows(prompt, text):
        return 0.0 if f"{text}. green" in prompt.text else -1.0

    result = evaluate(ScoringSampler(knows), data(tmp_path, *(item(i) for i in range(30))), shuffle=True)
    assert result.metrics["knowledge_accuracy"]["value"] == 1.0
    assert {row["completion"] for row in result.rows} == {"green"}
    assert len({row["letter"] for row in result.rows}) == 4


def test_planted_generations_and_what_cannot_be_read(tmp_path):
    """Of 10 answers 6 are right, 2 wrong, 2 name no option: accuracy .6, unparsed .2."""

    def script(prompt, index):
        i = int(prompt.text.split("?")[0].split()[-1])
        return "B" if i < 6 else "The answer is (C)." if i < 8 else "It depends on the light."

    result = evaluate(ScriptedSampler(script), data(tmp_path, *(item(i) for i in range(10))), by="generation")
    found = {name: m["value"] for name, m in result.metrics.items()}
    assert found["knowledge_accuracy"] == 0.6
    assert found["knowledge_unparsed_rate"] == 0.2
    assert found["knowledge_accuracy/chance_corrected"] == pytest.approx((0.6 - 0.25) / 0.75)
    assert result.metrics["knowledge_unparsed_rate"]["n"] == 10
    assert result.warnings == []


def test_a_target_without_log_probabilities_is_read_with_a_remark_or_refused(tmp_path):
    path = data(tmp_path, item())
    result = evaluate(ScriptedSampler(["B"]), path)
    assert result.source["by"] == "generation"
    assert result.warnings == ["scripted gives no log-probabilities: options were read from its answers"]
    with pytest.raises(ValueError, match="scripted gives no log-probabilities: use by=generation"):
        evaluate(ScriptedSampler(["B"]), path, by="logprob")


def test_a_failed_answer_is_unscored(tmp_path):
    def sampler(prompts, *, max_new_tokens, on_done, **more):
        assert max_new_tokens == 32
        return [[Completion(p.id, "", "error", error="down") if "0?" in p.text else Completion(p.id, "B", "stop")]
                for p in prompts]  # fmt: skip

    sampler.name = "endpoint"
    result = evaluate(sampler, data(tmp_path, item(0), item(1)), max_unscored=0.5)
    assert [result.metrics[m]["unscored"] for m in sorted(result.metrics)] == [1, 1, 1]
    assert result.metrics["knowledge_accuracy"]["value"] == 1.0


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1), ("b", 1), ("(b).", 1), ("**B**", 1), ("B. green", 1), ("B) because it is", 1),
        ("Answer: C", 2), ("The correct answer is **D**.", 3), ("The answer is option B because of it", 1),
        ("green", 1), ("Green.", 1), ("A long shade of grey", 3),
        ("<think>A or B? A.</think>\nC", 2), (" B\nQuestion: next", 1),
        ("A red one", None), ("The answer is A red one", None), ("green or blue", None), ("E", None), ("", None),
        ("I think B", None), ("Answer: A. No, answer: B", None), ("B.A. in arts", None),
    ],
)  # fmt: skip
def test_an_answer_is_read_strictly(text, index):
    assert read_option(text, OPTIONS) == index


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "choices": ["a", "b"], "answer": 1, "subject": "s"},
        {"prompt": "q", "options": ["a", "b"], "answer": "B", "category": "s"},
        {"question": "q", "choices": ["a", "b"], "answer": "1", "subject": "t", "category": "s"},
    ],
)
def test_the_usual_spellings_are_read(row):
    read = item_from_row(row)
    assert (read.extra["question"], read.extra["choices"], read.extra["answer"]) == ("q", ["a", "b"], 1)
    assert read.category == "s"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "'choices' must be a list of texts"),
        ({"choices": ["a", "b"], "answer": 0}, "no 'prompt'"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "'answer' must be 0 to 1 or a letter"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row, message):
    with pytest.raises(ValueError, match=message):
        item_from_row(row)


def test_one_question_with_other_options_is_another_question(tmp_path):
    rows = [item(0, 0, ["x", "y"]), item(0, 0, ["v", "w"]), item(0, 0, ["x", "y"])]
    result = evaluate(ScoringSampler(always("A")), data(tmp_path, *rows))
    assert len(result.rows) == 2
    assert result.warnings == ["left out 1 rows: repeats an earlier prompt"]


def test_the_order_of_the_file_changes_nothing(tmp_path):
    rows = [item(i, i % 4, subject=f"s{i % 3}") for i in range(12)]
    sampler = ScoringSampler(always("C"))
    one = evaluate(sampler, data(tmp_path, *rows))
    other = evaluate(sampler, data(tmp_path, *rows[::-1]), batch_prompts=5)
    assert (one.rows, one.metrics, one.breakdown) == (other.rows, other.metrics, other.breakdown)
    assert set(one.breakdown) == {"s0", "s1", "s2"}


def test_an_interrupted_eval_goes_on_where_it_was(tmp_path):
    run, asked = Run(tmp_path / "run"), []
    config = EvalConfig(data=data(tmp_path, *(item(i, i % 4) for i in range(10))), batch_prompts=4)

    def script(prompt, index):
        asked.append(prompt.id)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return "B"

    with pytest.raises(KeyboardInterrupt):
        run_eval("knowledge", ScriptedSampler(script), config, run)
    resumed = run_eval("knowledge", ScriptedSampler(script), config, run, resume=True)
    assert len(asked) == 6 + 6
    whole = run_eval("knowledge", ScriptedSampler(script), config, Run(tmp_path / "whole"))
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["chance"] == 0.25


def test_bundled_choices_serve_by_default():
    result = knowledge.evaluate(ScoringSampler(always("B")), EvalConfig())
    assert len(result.rows) == 70
    assert result.warnings == []
    assert abs(result.metrics["knowledge_accuracy/chance_corrected"]["value"]) < 0.1


def test_a_data_set_of_the_catalogue_is_asked_with_its_licence(tmp_path):
    config = EvalConfig(data=f"wmdp_bio:{data(tmp_path, item(0), item(1, 2))}")
    document = run_eval("knowledge", ScoringSampler(always("B")), config, Run(tmp_path / "run"))
    assert document["metrics"]["knowledge_accuracy"]["value"] == 0.5
    assert document["data"]["licences"] == {"wmdp_bio": "MIT"}


def test_gates():
    gate = EvalConfig(gate={"knowledge_accuracy": 0.5, "knowledge_unparsed_rate": 0.1}).gate
    metrics = {"knowledge_accuracy": {"value": 0.4}, "knowledge_unparsed_rate": {"value": 0.2}}
    assert [line.split(",")[1] for line in failed_gates(metrics, gate)] == [
        " below the gate 0.500",
        " above the gate 0.100",
    ]


@pytest.mark.parametrize("fmt", ["chat", "raw"])
def test_a_model_is_asked_in_either_format(tmp_path, tiny_policy, fmt):
    """The letters' log-probabilities are those that the model gives after the question as it was put."""
    sampler = LocalSampler(tiny_policy())
    path = data(tmp_path, item(), item(1, 0, ["x", "y"]))
    result = evaluate(sampler, path, prompt_format=fmt)
    assert result.source["prompt_format"] == fmt
    assert sampler.fmt == "chat"
    row = next(row for row in result.rows if row["prompt"] == "which colour 0?")
    asked = ask(item_from_row(item()), "letter", fmt, None)
    want = LocalSampler(sampler.policy, fmt=fmt).score([asked.prompt], [asked.answers])[0]
    assert row["logprobs"] == pytest.approx([nats for nats, _ in want], abs=1e-4)
    if fmt == "raw":
        assert asked.prompt.text.endswith("\n\nAnswer:")
        assert asked.answers == [" A", " B", " C", " D"]
