"""Eval `lm_eval`: tasks of the lm-eval harness (MMLU, GSM8K, ...), their results in the files that ours have.

lm-eval writes the prompts, reads the answers and computes the metrics. A model in this process is asked through its
`HFLM`, on the weights that are loaded already, adapters included. Any other target answers tasks that generate, as
a `Sampler`: an endpoint with its retries, cache, spending cap and `--dry-run`.

A metric is `METRIC/TASK`, with `/FILTER` where a task has several. Where it is a mean over samples, each row has its
sample's share: the metric is paired between systems, with Wilson's interval for yes or no, the bootstrap for numbers.
Elsewhere (perplexity, BLEU, groups weighted otherwise) the interval is 1.96 of lm-eval's standard errors.

    pip install 'tempering[lm-eval]'
    temper eval smollm2 lm_eval tasks=[gsm8k,arc_easy] limit=100
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.core.ledger import SPENT
from tempering.core.records import Completion, Prompt
from tempering.evals.lm_eval_results import add_outcomes, digest, sample_rows, task_facts
from tempering.evals.results import Cost, EvalResult, Journal, Progress, by_category, remarks, require_scored
from tempering.evals.settings import EvalConfig

if TYPE_CHECKING:
    from tempering.core.sampling import Sampler  # loads torch, for which `temper --help` must not wait

ANSWER_TOKENS = 256
"""What lm-eval lets a task generate that does not say how much."""


def evaluate(
    sampler: Sampler,
    config: EvalConfig,
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Run the tasks; `journal` is not used: only an endpoint's answers survive an interruption, in its cache.

    Raises:
        ValueError: the package or a task is not there, or tasks need log-probabilities that the target lacks.
        RuntimeError: too many answers failed, or an endpoint's spending limit is reached.
    """
    cost, loaded = Cost(), load_tasks(config)
    from lm_eval import simple_evaluate

    model, failed = _model(sampler, config, loaded["tasks"], cost, progress)
    is_chat = config.prompt_format != "raw"
    found = simple_evaluate(
        model=model,
        tasks=[*_top(loaded)],
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        limit=config.limit,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
        gen_kwargs=_generation(config) or None,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        bootstrap_iters=1000,
    )
    leaves = {
        g.name: tuple(t.task_name for t in g.get_all_tasks()) for g in _top(loaded) if hasattr(g, "child_names")
    }
    rows = sample_rows(found["samples"], {name: task.doc_to_text for name, task in loaded["tasks"].items()}, failed)
    metrics = add_outcomes(found, leaves, rows, identity=f"lm-eval {importlib.metadata.version('lm_eval')}")
    require_scored(rows, config.max_unscored, "the target's answers")
    return EvalResult(
        rows,
        metrics,
        by_category(rows, {name: metric["judge"] for name, metric in metrics.items()}),
        cost.summary(),
        remarks(rows),
        {
            "source": f"lm-eval tasks {', '.join(config.tasks)}",
            "sha256": digest(found["samples"]),
            "prompts": len(rows),
        },
        {"tasks": {name: task_facts(found, name) for name in loaded["tasks"]}},
    )


def load_tasks(config: EvalConfig) -> dict[str, Any]:
    """Load the named tasks with their data; returns lm-eval's `tasks` and `groups` by name.

    Raises:
        ValueError: see `require_tasks`; or a task runs code that a model wrote.
    """
    names = require_tasks(config)
    loaded = _manager(config.include_path).load(names)
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise ValueError(
            f"task {unsafe[0]} runs code that the model writes; run it with lm-eval itself, in a sandbox"
        )
    return loaded


def require_tasks(config: EvalConfig) -> list[str]:
    """Return the tasks that are asked for; nothing of their data is loaded.

    Raises:
        ValueError: lm-eval is not installed, `data` is set, or no task, or one that is not there, is named.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("eval lm_eval needs the package lm-eval: pip install 'tempering[lm-eval]'")
    if config.data is not None:
        raise ValueError(
            "lm_eval reads the data that its tasks name: leave out data=, or run it in a command of its own"
        )
    if not config.tasks:
        raise ValueError(
            "lm_eval needs tasks=[NAME,...], such as tasks=[gsm8k,arc_easy]; `lm-eval ls tasks` lists them"
        )
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise FileNotFoundError(f"include_path={config.include_path} is not a folder")
    known = _manager(config.include_path).all_tasks
    for name in config.tasks:
        if name not in known and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(f"lm-eval has no task {name!r}; {hint} (include_path=DIR adds a folder of your own)")
    return list(config.tasks)


@functools.cache
def _manager(include_path: str | None) -> Any:
    """Index the tasks, which takes seconds: lm-eval has thousands."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path)


def _top(loaded: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the groups and tasks that are in no group, as lm-eval objects."""
    groups = loaded.get("groups", {})
    inner = {child for group in groups.values() for child in group.child_names}
    yield from (item for found in (groups, loaded["tasks"]) for name, item in found.items() if name not in inner)


def _generation(config: EvalConfig) -> dict[str, Any]:
    """Return what the user says about generation: the rest is each task's own."""
    given = config.model_fields_set
    found: dict[str, Any] = {}
    if "max_new_tokens" in given:
        found["max_gen_toks"] = config.max_new_tokens
    if "temperature" in given:
        found |= {"temperature": config.temperature, "do_sample": config.temperature > 0}
    if "top_p" in given:
        found["top_p"] = config.top_p
    return found


def _model(
    sampler: Sampler, config: EvalConfig, tasks: Mapping[str, Any], cost: Cost, progress: Progress | None
) -> tuple[Any, dict[tuple[str, int], str]]:
    """Return the target as lm-eval's `LM`, and where it will say which samples got no answer, and why."""
    from lm_eval.api.model import LM

    from tempering.core.sampling import LocalSampler

    if type(sampler) is LocalSampler:  # what a subclass does on top would be lost
        from lm_eval.models.huggingface import HFLM

        policy = sampler.policy
        if config.prompt_format != "raw" and not policy.tokenizer.chat_template:
            raise ValueError(f"{sampler.name} has no chat template: use prompt_format=raw")
        return HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=config.batch_size), {}
    if scored := sorted(name for name, task in tasks.items() if task.OUTPUT_TYPE != "generate_until"):
        raise ValueError(
            f"{sampler.name} gives no log-probabilities, which {', '.join(scored[:3])}"
            f"{' and others' if len(scored) > 3 else ''} need; name tasks that generate, such as gsm8k"
        )
    target = type("Target", (Answers, LM), {})(sampler, config.seed, cost, progress)
    return target, target.failed


class Answers:
    """What lm-eval asks of an `LM` that generates, through a `Sampler`; stop sequences are cut off here."""

    tokenizer_name = ""

    def __init__(self, sampler: Sampler, seed: int, cost: Cost, progress: Progress | None) -> None:
        super().__init__()
        self.sampler, self.seed, self.cost, self.progress = sampler, seed, cost, progress
        self.failed: dict[tuple[str, int], str] = {}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Keep the turns: the target applies its own template."""
        return json.dumps(chat_history)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer every request; one without an answer is noted in `failed`, and its text is empty.

        Raises:
            RuntimeError: the endpoint's spending limit is reached.
        """
        texts, done = [""] * len(requests), 0
        repeats: dict[int, int] = {}
        batches: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            repeat = repeats[id(request)] = repeats.get(id(request), -1) + 1
            batches.setdefault(json.dumps([repeat, request.args[1]], sort_keys=True), []).append(place)

        def on_done(count: int) -> None:
            nonlocal done
            done += count
            if self.progress:
                self.progress(done, len(requests))

        for key, places in batches.items():
            repeat, settings = json.loads(key)
            groups = self._ask([requests[i].args[0] for i in places], self.seed + repeat, settings, on_done)
            self.cost.add(groups)
            for place, (answer,) in zip(places, groups, strict=True):
                if answer.finish == "error":
                    self.failed[requests[place].task_name, requests[place].doc_id] = str(answer.error)
                texts[place] = cut(answer.text, settings.get("until") or ())
        if spent := [reason for reason in self.failed.values() if SPENT in reason]:
            raise RuntimeError(f"{spent[0]}; raise the limit and go on with --resume, which asks nothing twice")
        return texts

    def _ask(
        self, contexts: Sequence[str], seed: int, settings: Mapping[str, Any], on_done: Callable[[int], None]
    ) -> list[list[Completion]]:
        prompts = [Prompt(_turns(context)) for context in contexts]
        return self.sampler(prompts, seed=seed, on_done=on_done, **sampling(settings))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Not possible here."""
        raise NotImplementedError("a sampler gives no log-probabilities")

    loglikelihood_rolling = loglikelihood


def _turns(context: str) -> tuple[dict[str, str], ...]:
    """Read what `apply_chat_template` kept; with prompt_format=raw it is plain text, and the user's turn."""
    try:
        turns = json.loads(context)
    except ValueError:
        turns = None
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    return ({"role": "user", "content": context},)


def sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's `generation_kwargs` as a `Sampler` takes them; others, such as `top_k`, are left out.

    >>> sampling({"until": [], "do_sample": True, "max_tokens": 9}), sampling({"temperature": 0.5})["temperature"]
    ({'max_new_tokens': 9, 'temperature': 1.0, 'top_p': 1.0}, 0.5)
    """
    tokens = [settings[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if settings.get(key)]
    is_greedy = settings.get("do_sample") is False
    default = 1.0 if settings.get("do_sample") else 0.0
    return {
        "max_new_tokens": int((tokens or [ANSWER_TOKENS])[0]),
        "temperature": 0.0 if is_greedy else float(settings.get("temperature", default)),
        "top_p": float(settings.get("top_p") or 1.0),
    }


def cut(text: str, until: str | Sequence[str]) -> str:
    """Return the text up to the first of the stop sequences.

    >>> cut("42. Q: and then?", ["Q:", "!"])
    '42. '
    """
    ends = [text.find(end) for end in ([until] if isinstance(until, str) else until) if end]
    return text[: min([at for at in ends if at >= 0], default=len(text))]
