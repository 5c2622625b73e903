import json
import math

import pytest
import torch

from tempering.api import evaluate as evaluate_target
from tempering.core.ledger import SPENT
from tempering.core.policy import LoraSettings, Policy
from tempering.core.records import Completion, Verdict
from tempering.core.run import Run
from tempering.core.sampling import LocalSampler, ScriptedSampler
from tempering.evals import EvalConfig, failed_gates, run_eval, settled, toxicity
from tempering.evals.estimate import estimate
from tempering.evals.toxicity import distinct, fluency_of, opening_from_row


class NumberJudge:
    """The text is the score; `insult` is half of it. `?` is unscored, an empty text clean."""

    identity = "number"

    def __call__(self, prompt, completions):
        return [self.one(c) for c in completions]

    def one(self, c):
        if c.finish == "error" or c.text == "?":
            return Verdict(None, "number", reason=c.error or "unreadable")
        if not c.text:
            return Verdict(0.0, "number", "degenerate")
        return Verdict(float(c.text), "number", attributes={"insult": float(c.text) / 2})


def data(tmp_path, n=4, rows=None):
    path = tmp_path / "p.jsonl"
    rows = rows or [{"prompt": f"opening {i}", "category": f"c{i % 2}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(path, script, **settings):
    config = EvalConfig(data=path, **settings)
    return toxicity.evaluate(ScriptedSampler(script), config, toxicity_judge=NumberJudge())


def values(metrics):
    return {name: m["value"] for name, m in metrics.items()}


def by_table(prompt, index):
    """Three continuations for each of four openings; maxima 0.9, 0.5, 0.4, 0.0."""
    table = [["0.1", "0.9", "0.2"], ["0.5", "0.5", "0.2"], ["0.4", "0.0", "0.2"], ["", "0.0", "0.0"]]
    return table[int(prompt.text.split()[-1])][index]


def test_hand_derived_metrics(tmp_path):
    """Maxima .9 .5 .4 0: mean .45, two of four from .5 on. Means .4 .4 .2 0: .25. `insult` is half of each."""
    result = evaluate(data(tmp_path), by_table, continuations=3)
    found = values(result.metrics)
    assert found["expected_max_toxicity"] == pytest.approx(0.45)
    assert found["toxicity_probability"] == 0.5
    assert found["mean_toxicity"] == pytest.approx(0.25)
    assert found["expected_max_toxicity/insult"] == pytest.approx(0.225)
    assert found["toxicity_probability/insult"] == 0.0
    assert found["mean_toxicity/insult"] == pytest.approx(0.125)
    assert all(m["low"] <= m["value"] <= m["high"] and m["n"] == 4 for m in result.metrics.values() if m["n"] > 3)
    worst = {row["prompt"]: (row["completion"], row["index"], row["scores"]) for row in result.rows}
    assert worst["opening 0"] == ("0.9", 1, [0.1, 0.9, 0.2])
    assert worst["opening 3"] == ("", 0, [0.0, 0.0, 0.0])
    assert values(result.breakdown["c0"])["expected_max_toxicity"] == pytest.approx(0.65)


def test_words_that_repeat_lower_distinct(tmp_path):
    """`0.5 0.5 0.2` are six numbers, 0 5 0 5 0 2, three of them different; pairs within a text: 05, 05, 02."""
    result = evaluate(data(tmp_path, 2), by_table, continuations=3)
    [row] = [row for row in result.rows if row["prompt"] == "opening 1"]
    assert row["outcomes"]["distinct_1"] == 3 / 6
    assert row["outcomes"]["distinct_2"] == pytest.approx(2 / 3)
    assert distinct([""], 1) is None


def test_planted_rates_are_recovered(tmp_path):
    """One of ten continuations of every fourth opening is toxic: a quarter of the prompts, a fortieth of all."""

    def script(prompt, index):
        return "1.0" if index == 7 and int(prompt.text.split()[-1]) % 4 == 0 else "0.0"

    result = evaluate(data(tmp_path, 200), script, continuations=10)
    found = values(result.metrics)
    assert found["toxicity_probability"] == found["expected_max_toxicity"] == 0.25
    assert found["mean_toxicity"] == pytest.approx(0.025)
    for name in ("toxicity_probability", "expected_max_toxicity"):
        low, high = result.metrics[name]["low"], result.metrics[name]["high"]
        assert 0.18 < low < 0.21 and 0.29 < high < 0.33


def test_a_clean_target_is_not_certain_to_be_clean(tmp_path):
    metric = evaluate(data(tmp_path), lambda p, i: "0.0", continuations=2).metrics["expected_max_toxicity"]
    assert (metric["value"], metric["low"]) == (0.0, 0.0)
    assert metric["high"] > 0.3


def test_the_expected_maximum_grows_with_the_number_of_continuations(tmp_path):
    def script(prompt, index):
        return f"{(index * 7 % 10) / 10}"

    found = [
        values(evaluate(data(tmp_path), script, continuations=k).metrics)["expected_max_toxicity"] for k in (1, 2, 5)
    ]
    assert found == sorted(found) and found[0] < found[-1]


def test_a_prompt_with_an_unscored_continuation_is_unscored(tmp_path):
    def script(prompt, index):
        return "?" if prompt.text == "opening 1" and index == 1 else "0.9"

    with pytest.raises(RuntimeError, match=r"toxicity_probability: 1 of 4 answers unscored .*unreadable"):
        evaluate(data(tmp_path), script, continuations=2)
    result = evaluate(data(tmp_path), script, continuations=2, max_unscored=0.25)
    metric = result.metrics["toxicity_probability"]
    assert (metric["value"], metric["n"], metric["unscored"]) == (1.0, 3, 1)
    assert result.metrics["expected_max_toxicity/insult"]["unscored"] == 1
    [row] = [row for row in result.rows if row["outcome"] is None]
    assert (row["index"], row["scores"]) == (1, [0.9, None])


def test_failed_continuations_are_told(tmp_path):
    def sampler(prompts, *, n, **more):
        bad = [Completion("p", "", "error", error="down"), *[Completion("p", "0.1", "stop")] * (n - 1)]
        return [bad if p.text == "opening 0" else bad[1:] + bad[1:2] for p in prompts]

    sampler.name = "endpoint"
    config = EvalConfig(data=data(tmp_path), continuations=3, max_unscored=0.3)
    result = toxicity.evaluate(sampler, config, toxicity_judge=NumberJudge())
    assert "1 of 12 continuations failed; their prompts are unscored" in result.warnings


def test_sampling_is_the_papers_unless_said_otherwise(tmp_path):
    seen = []

    class Recorder(ScriptedSampler):
        def __call__(self, prompts, **settings):
            seen.append({k: settings[k] for k in ("n", "temperature", "top_p", "max_new_tokens")})
            return super().__call__(prompts, **settings)

    path = data(tmp_path, 1)
    for more in ({}, {"temperature": 0.7, "max_new_tokens": 128}, {"temperature": 0, "continuations": 1}):
        toxicity.evaluate(Recorder(["0.1"]), EvalConfig(data=path, **more), toxicity_judge=NumberJudge())
    assert seen == [
        {"n": 25, "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 20},
        {"n": 25, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 128},
        {"n": 1, "temperature": 0.0, "top_p": 0.9, "max_new_tokens": 20},
    ]
    with pytest.raises(ValueError, match="temperature=0 gives 25 equal continuations"):
        toxicity.evaluate(ScriptedSampler(["x"]), EvalConfig(temperature=0.0), toxicity_judge=NumberJudge())
    assert settled("harm", EvalConfig()) == EvalConfig()


def test_the_settings_on_file_are_those_that_were_used(tmp_path):
    config = EvalConfig(data=data(tmp_path), continuations=2)
    document = run_eval("toxicity", ScriptedSampler(["fine"]), config, Run(tmp_path / "run"))
    assert document["settings"]["temperature"] == 1.0
    assert document["settings"]["prompt_format"] == "raw"
    assert document["metrics"]["toxicity_probability"]["judge"] == "rules/toxic/v1"


def test_an_interrupted_eval_goes_on_where_it_was(tmp_path):
    run, asked = Run(tmp_path / "run"), []
    config = EvalConfig(data=data(tmp_path, 12), continuations=2, batch_prompts=8)  # four prompts at a time

    def script(prompt, index):
        asked.append(prompt.id)
        if len(asked) == 13:
            raise KeyboardInterrupt
        return "you are an idiot" if index and prompt.text.endswith("3") else "good morning"

    with pytest.raises(KeyboardInterrupt):
        run_eval("toxicity", ScriptedSampler(script), config, run)
    assert len(run.read_rows("evals/toxicity.partial.jsonl")) == 5
    resumed = run_eval("toxicity", ScriptedSampler(script), config, run, resume=True)
    assert len(asked) == 13 + 16
    whole = run_eval("toxicity", ScriptedSampler(script), config, Run(tmp_path / "whole"))
    assert resumed["metrics"] == whole["metrics"]
    assert run.read_rows("evals/toxicity.jsonl") == Run(tmp_path / "whole").read_rows("evals/toxicity.jsonl")
    assert resumed["metrics"]["toxicity_probability"]["value"] == pytest.approx(1 / 12)


def test_finished_results_are_kept_on_resume_and_other_settings_refused(tmp_path):
    out = tmp_path / "run"
    settings = {"out": out, "data": data(tmp_path), "continuations": 2}
    one = evaluate_target(ScriptedSampler(["fine"]), ["toxicity"], **settings)
    assert evaluate_target(ScriptedSampler(["x"]), ["toxicity"], resume=True, **settings) == one
    with pytest.raises(ValueError, match=r"made with temperature=1\.0, not 0\.5"):
        evaluate_target(ScriptedSampler(["x"]), ["toxicity"], resume=True, temperature=0.5, **settings)


def test_prompts_of_real_toxicity_prompts_are_read():
    row = {
        "filename": "x", "begin": 1, "challenging": False, "continuation": {"text": "z"},
        "prompt": {"text": "So he said", "toxicity": 0.2, "threat": None},
    }  # fmt: skip
    prompt = opening_from_row(row)
    assert (prompt.text, prompt.category, prompt.extra) == ("So he said", "nontoxic_prompt", {})
    assert opening_from_row({"prompt": {"text": "x", "toxicity": None}}).category is None
    assert opening_from_row({"prompt": "plain", "category": "c"}).category == "c"
    with pytest.raises(ValueError, match="no 'prompt'"):
        opening_from_row({"prompt": {"toxicity": 0.1}})


def test_bundled_openings_serve_by_default(tmp_path):
    result = toxicity.evaluate(ScriptedSampler(["a good day"]), EvalConfig(continuations=1))
    assert len(result.rows) == 40
    assert set(result.breakdown) >= {"family", "provoking"}
    assert result.warnings == [
        "fluency_perplexity is absent: scripted has no weights here, and no fluency_model is named",
        "scripted answers chat turns: prompts were put as such, not as text to go on with",
    ]


def test_gates_are_ceilings():
    gate = EvalConfig(gate={"toxicity_probability": 0.1, "expected_max_toxicity/insult": 0.2}).gate
    metrics = {"toxicity_probability": {"value": 0.2}, "expected_max_toxicity/insult": {"value": 0.2}}
    assert failed_gates(metrics, gate) == ["toxicity_probability is 0.200, above the gate 0.100"]


def test_where_a_spending_limit_left_one_unscored_that_one_is_shown():
    said = [Verdict(None, "j", reason="unreadable"), Verdict(None, "j", reason=f"no completion: {SPENT}: ...")]
    assert toxicity.worst(said) == 1
    assert toxicity.worst(said[:1] * 2) == 0


def test_a_fluency_model_behind_an_endpoint_is_refused():
    with pytest.raises(ValueError, match="does not tell how likely a given text is"):
        EvalConfig(fluency_model="openai:m@http://host/v1")


def test_a_dry_run_of_a_local_target_counts_its_scorer(tmp_path):
    config = EvalConfig(data=data(tmp_path), continuations=3, toxicity_judge="openai:j@http://host/v1")
    [found] = estimate("toxicity", "smollm2", config)
    assert (found["role"], found["requests"]) == ("judge (toxic)", 12)
    assert estimate("knowledge", "smollm2", EvalConfig()) == []


def test_what_is_the_default_of_other_evals_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = data(tmp_path)
    for more in ({}, {"top_p": 1.0}, {"max_new_tokens": 128}):
        evaluate_target(ScriptedSampler(["fine"]), ["toxicity"], data=path, continuations=2, **more)
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_a_data_set_of_the_catalogue_brings_its_licence(tmp_path):
    rows = [{"prompt": {"text": f"So he said {i}", "toxicity": 0.2}, "challenging": i == 0} for i in range(3)]
    config = EvalConfig(data=f"real_toxicity_prompts:{data(tmp_path, rows=rows)}", continuations=2)
    document = run_eval("toxicity", ScriptedSampler(["fine"]), config, Run(tmp_path / "run"))
    assert document["data"]["licences"] == {"real_toxicity_prompts": "Apache-2.0"}
    assert set(document["breakdown"]) == {"challenging", "ordinary"}


# --- with weights -------------------------------------------------------------------------------------


def test_neither_order_nor_batch_changes_anything(tmp_path, tiny_policy):
    config = {"continuations": 3, "max_new_tokens": 6}
    rows = [{"prompt": "stone " * (i + 1)} for i in range(5)]
    sampler = LocalSampler(tiny_policy())
    one = toxicity.evaluate(sampler, EvalConfig(data=data(tmp_path, rows=rows), **config))
    other = toxicity.evaluate(
        LocalSampler(tiny_policy(), batch_rows=2),
        EvalConfig(data=data(tmp_path, rows=rows[::-1]), batch_prompts=6, **config),
    )
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a["outcomes"].pop("fluency_nll") == pytest.approx(b["outcomes"].pop("fluency_nll"), abs=1e-4)
    assert one.rows == other.rows
    assert sampler.fmt == "chat"  # the caller's sampler is as it was
    assert one.source["prompt_format"] == "raw"


def test_fluency_is_the_nll_of_the_text_given_the_prompt(tmp_path, tiny_policy):
    """Computed again from the model's own logits, for one prompt: sum over k texts over the sum of their tokens."""
    policy = tiny_policy()
    config = EvalConfig(data=data(tmp_path, rows=[{"prompt": "the safe answer"}]), continuations=2, max_new_tokens=5)
    result = toxicity.evaluate(LocalSampler(policy), config)
    prompt = policy.tokenizer("the safe answer", add_special_tokens=False)["input_ids"]
    groups = LocalSampler(policy, fmt="raw")(
        [opening_from_row({"prompt": "the safe answer"})], n=2, max_new_tokens=5, temperature=1.0, top_p=0.9
    )
    nats = tokens = 0
    for completion in groups[0]:
        text = policy.tokenizer(completion.text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + text])
        with torch.no_grad():
            logprobs = policy.model(ids).logits[0].float().log_softmax(-1)
        nats -= sum(float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(text))
        tokens += len(text)
    assert result.metrics["fluency_nll"]["value"] == pytest.approx(nats / tokens, abs=1e-3)
    assert result.metrics["fluency_perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    assert result.metrics["fluency_perplexity"]["judge"].startswith("perplexity under ")


def test_fluency_is_under_the_start_not_under_the_target(tiny_policy, tiny_model_dir):
    policy = tiny_policy()
    policy.add_adapter("a", LoraSettings(r=2), seed=0)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if ".lora_B." in name:
                weight.fill_(0.5)
    prompts = [opening_from_row({"prompt": text}) for text in ("the safe", "yes sure stone")]
    groups = [[Completion(p.id, t, "stop") for t in (" river", "", " apple stone")] for p in prompts]
    found = fluency_of(LocalSampler(policy, fmt="raw"), EvalConfig())(prompts, groups)
    texts = [[" river", " apple stone"]] * 2
    base = LocalSampler(tiny_policy(), fmt="raw").score(prompts, texts)
    changed = LocalSampler(policy, fmt="raw").score(prompts, texts)
    assert [x for g in found for x, _ in g] == pytest.approx([x for g in base for x, _ in g], abs=1e-4)
    assert [x for g in found for x, _ in g] != pytest.approx([x for g in changed for x, _ in g], abs=1e-2)

    other = EvalConfig(fluency_model=str(tiny_model_dir("llama", 1)))
    named = fluency_of(ScriptedSampler(["x"]), other)
    want = LocalSampler(Policy.load(other.fluency_model, dtype="auto"), fmt="raw").score(prompts, texts)
    assert [x for g in named(prompts, groups) for x, _ in g] == pytest.approx(
        [x for g in want for x, _ in g], abs=1e-3
    )
