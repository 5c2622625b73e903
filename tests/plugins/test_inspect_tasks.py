"""Our evals as Inspect's own tasks: same prompts, same answers, same numbers as `temper eval`."""

import gc
import importlib.metadata
import math

import pytest

from tempering.api import evaluate
from tempering.core.sampling import ScriptedSampler

pytestmark = [
    pytest.mark.interop,
    # Inspect 0.3.285 uses a name that tenacity 9.2 has deprecated, and leaves streams of its own open.
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
inspect_ai = pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")


@pytest.fixture(autouse=True)
def nothing_left_open():
    """What Inspect leaves open is warned of in the test that opened it, where that is passed over."""
    yield
    gc.collect()


def answers(prompt, index):
    """A refusal of every other request, a letter for a choice, nothing sensible for the rest."""
    if "Answer with the letter only." in prompt.text:
        return "A"
    return ("I can't help with that.", "Sure, here is how: first take the thing.")[len(prompt.text) % 2]


@pytest.fixture
def both(serve, tmp_path):
    """A function: name of an eval, settings -> (metrics of Inspect by scorer, our metrics)."""
    url, bodies = serve(ScriptedSampler(answers))

    def run(name, ours=None, **arguments):
        from inspect_ai.model import get_model

        model = get_model("openai-api/local/m", base_url=url, api_key="EMPTY")
        (log,) = inspect_ai.eval(
            f"tempering/{name}", model=model, task_args=arguments, log_dir=str(tmp_path / "logs"), display="none"
        )
        assert log.status == "success", log.error
        found = {s.name: {k.rpartition("/")[2]: m.value for k, m in s.metrics.items()} for s in log.results.scores}
        settings = arguments if ours is None else ours
        kept = evaluate(f"openai:m@{url}", [name], out=tmp_path / f"run-{name}", **settings)
        return found, kept[name]["metrics"], log, bodies

    return run


def same(found, metric):
    return [found[key] for key in ("mean", "low_95", "high_95")] == pytest.approx(
        [metric[key] for key in ("value", "low", "high")]
    )


def test_inspect_finds_our_tasks_by_the_entry_point():
    points = {point.name: point.value for point in importlib.metadata.entry_points(group="inspect_ai")}
    assert points.get("tempering") == "tempering.plugins.inspect_tasks"


def test_harm_has_the_same_prompts_and_rates(both):
    found, ours, log, bodies = both("harm", limit=8)
    assert 0 < ours["harmful_rate"]["value"] < 1
    assert same(found["harmful"], ours["harmful_rate"]) and same(found["refused"], ours["refusal_rate"])
    assert {b["messages"][0]["content"] for b in bodies[:8]} == {b["messages"][0]["content"] for b in bodies[8:]}
    assert log.samples[0].scores["harmful"].metadata["judge"].startswith("rules")


def test_an_attacked_request_is_judged_by_the_plain_one(both):
    found, ours, log, _ = both("harm", {"attacks": ["templates"], "limit": 6}, attack="templates", limit=6)
    assert same(found["harmful"], ours["attack_success_rate/templates"])
    sample = log.samples[0]
    assert sample.metadata["request"][0]["content"] in sample.input != sample.metadata["request"][0]["content"]


def test_over_refusal_counts_partial_refusals(both):
    found, ours, *_ = both("over_refusal", limit=6)
    assert same(found["over_refused"], ours["over_refusal_rate"])


def test_capability_reads_letters_and_first_lines(both):
    found, ours, *_ = both("capability", limit=12)
    assert same(found["right_answer"], ours["capability_accuracy"])


def test_safe_informative_has_both_of_its_scores(both):
    found, ours, *_ = both("safe_informative", limit=6)
    for name in ("safe_rate", "joint_score"):
        assert same(found[name], ours[name])


def test_a_judge_that_cannot_tell_leaves_the_sample_unscored(serve, tmp_path, monkeypatch):
    from inspect_ai import Task
    from inspect_ai.dataset import Sample
    from inspect_ai.model import get_model

    from tempering import judges
    from tempering.core.records import Verdict
    from tempering.plugins import inspect_tasks

    class Silent:
        identity = "silent"

        def __call__(self, prompt, completions):
            unsure = "2" in prompt.text
            return [Verdict(None if unsure else 1.0, "silent", reason="no verdict in reply") for _ in completions]

    monkeypatch.setattr(judges, "load_judge", lambda *_: Silent())
    url, _ = serve(ScriptedSampler(["yes"]))
    task = Task(dataset=[Sample(input=f"q{i}") for i in (1, 2, 3)], scorer=inspect_tasks.harmful("rules"))
    model = get_model("openai-api/local/m", base_url=url, api_key="EMPTY")
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    values = [s.scores["harmful"].value for s in log.samples]
    assert values[0] == values[2] == 1.0 and math.isnan(values[1])
    assert log.results.scores[0].metrics["mean"].value == 1.0


def test_a_wrong_argument_is_said_in_words():
    from tempering.plugins import inspect_tasks

    with pytest.raises(ValueError, match="attack 'pair' asks the target several times"):
        inspect_tasks.harm(attack="pair")
    with pytest.raises(ValueError, match="unknown attack 'prefil'"):
        inspect_tasks.harm(attack="prefil")
