"""What a run of safemoe starts from: experts, read and checked, the base, and the safe answers as tokens."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tempering.core.chat import Encoded, encode, format_of
from tempering.core.loading import resolve
from tempering.core.policy import Policy, public_base
from tempering.core.progress import say
from tempering.core.quarantine import unsafe_name
from tempering.core.records import LabelledCompletion, labelled_from_row, prompt_from_row
from tempering.core.run import Run
from tempering.core.sampling import local_sampler
from tempering.data.describe import sha256_of
from tempering.data.files import read_records, scan_rows, training_file
from tempering.data.split import hold_out_prompts, prompt_key
from tempering.methods.safemoe.attaching import require_layers
from tempering.methods.safemoe.expert_rows import ExpertRowsConfig, file_of, read_domains, run_expert_rows
from tempering.methods.safemoe.experts import (
    Adapter,
    Experts,
    layers_of,
    only_layers,
    random_experts,
    read_adapter,
    require_base,
    require_named_base,
    stack_experts,
)
from tempering.methods.safemoe.identity import base_identity
from tempering.methods.safemoe.keys import sealing_keys
from tempering.methods.safemoe.settings import SafeMoEConfig


class Stage(NamedTuple):
    """A run that must be there before this one: a method, and its configuration."""

    method: str
    settings: dict[str, Any]


class Data(NamedTuple):
    """Rows by id, their tokens, those to train on and held out, and what was left out."""

    rows: dict[str, LabelledCompletion]
    tokens: dict[str, Encoded]
    ids: list[str]
    held: list[str]
    replay: list[Encoded]
    dropped: dict[str, int]


# --- experts ------------------------------------------------------------------------------------------


def rows_config(config: SafeMoEConfig) -> ExpertRowsConfig | None:
    """Return what makes the rows that experts are trained on, beside the run; `None` where they are given."""
    if config.expert_rows is None:
        return None
    settings = config.expert_rows.model_dump()
    return ExpertRowsConfig(**settings, out=f"{config.out}-rows", model=config.model, seed=config.seed)


def expert_files(config: SafeMoEConfig) -> dict[str, str]:
    """Return domain -> file of rows of each expert to be trained first."""
    rows = rows_config(config)
    if rows is None:
        return config.expert_data
    return {domain: str(Path(rows.out) / f"{file_of(domain)}.jsonl") for domain in rows.domains}


def make_rows(config: SafeMoEConfig, policy: Policy, *, resume: bool = False) -> None:
    """Make the rows of `expert_rows`, where there are any to make; `policy`, the start model, answers.

    Then all rows are tokenized once: what cannot be trained on is told before the first expert is trained.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: wrong input; nothing has been written.
        RuntimeError: the model or the judge failed, or no row is left.
    """
    rows = rows_config(config)
    if rows is not None:
        say(f"rows of {len(rows.domains)} experts: {rows.out}")
        run_expert_rows(rows, lambda _: local_sampler(policy), resume=resume)
    prepare(config, policy)
    for domain, file in expert_files(config).items():
        is_trained = (expert_folder(config, domain) / "DONE").is_file()
        if not is_trained and not tokenize(config, policy, read_rows(config, file)[0], file, {}):
            raise ValueError(f"{file}: no answer is left to train the expert {domain} on")


def stages(config: SafeMoEConfig) -> list[Stage]:
    """Return the training of each expert that has rows; whoever runs this method runs those first.

    Raises:
        ValueError: two domains would share a folder.
    """
    found = []
    for domain, file in expert_files(config).items():
        settings = {
            "model": config.model, "out": str(expert_folder(config, domain)),
            "data": {"train": file, "invalid": config.invalid},
            "domain": domain, "unsafe": config.expert.unsafe, "seed": config.seed, "dtype": config.dtype,
            "lora": config.expert.lora.model_dump(), "epochs": config.expert.epochs,
            "batch_rows": config.expert.batch_rows, "lr": config.expert.lr, "split": {"share": 0.0},
            "checkpoint_every": config.expert.checkpoint_every, "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length, "prompt_format": config.prompt_format,
        }  # fmt: skip
        found.append(Stage("sft", settings))
    folders = [stage.settings["out"] for stage in found]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise ValueError(f"experts: two domains would be trained in {twice.pop()}; rename one")
    return found


def expert_folder(config: SafeMoEConfig, domain: str) -> Path:
    """Where the expert of a domain is trained: beside the run, which holds no loose expert."""
    folder = Path(f"{config.out}-experts") / re.sub(r"[^\w-]+", "_", domain.lower())
    return Path(unsafe_name(folder)) if config.expert.unsafe else folder


def delete_experts(config: SafeMoEConfig) -> None:
    """Delete the experts that were trained for the run, where it shall not keep them; what stays is told."""
    for folder in [] if config.keep_experts else [expert_folder(config, domain) for domain in expert_files(config)]:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            say(f"[bold red]keep_experts=false: {folder} could not be deleted, and holds an expert; delete it[/]")


def read_experts(config: SafeMoEConfig, policy: Policy) -> Experts:
    """Read all experts, check them against each other and the base, and stack them.

    Raises:
        FileNotFoundError, ValueError: naming the expert and the field.
    """
    folders: list[str | Path] = [*config.experts, *(expert_folder(config, domain) for domain in expert_files(config))]
    adapters = [read_adapter(folder) for folder in folders]
    base = base_identity(policy)
    require_base(adapters, base)
    modules = stack_experts(adapters)
    require_layers(policy.base, modules)
    experts = Experts(tuple(a.domain for a in adapters), modules, base, tuple(a.source for a in adapters))
    experts = only_layers(experts, config.layers)
    if config.control == "random_experts":
        experts = random_experts(experts, config.seed)
    return experts.to("cpu", policy.dtype)  # as they are computed in, trained behind and sealed


def load_base(config: SafeMoEConfig) -> Policy:
    """Load the start model; an adapter that it has is merged in memory, and so is part of the base's identity."""
    policy = Policy.load(config.model, dtype=config.dtype)
    if policy.adapters:
        policy.merge()
    return policy


# --- data ---------------------------------------------------------------------------------------------


def read_rows(
    config: SafeMoEConfig, source: str, limit: int | None = None
) -> tuple[list[LabelledCompletion], dict[str, int]]:
    """Read answers to imitate.

    Raises:
        FileNotFoundError, ValueError: with file and line.
    """
    found = read_records(
        training_file(source), labelled_from_row, limit=limit, invalid=config.invalid, remedy="set invalid=drop"
    )
    if wrong := [row.id for row in found.records if not row.desirable]:
        raise ValueError(f"{source}: row {wrong[0]} has a false label: an undesirable answer must not be imitated")
    return found.records, found.dropped


def check(config: SafeMoEConfig, *, resume: bool = True) -> None:
    """Refuse wrong data before anything is trained: what can be read without a model.

    Raises:
        FileNotFoundError, ValueError: naming file and line, or the evaluation prompt that would be trained on.
        FileExistsError: rows or an expert that are to be made are there already, and `resume` is false.
    """
    given = require_experts(config)
    rows = rows_config(config)
    made = [stage.settings["out"] for stage in stages(config)]
    for folder in [rows.out, *made] if rows else made:
        Run.require_free(folder, resume)
    if config.router_data is None:
        raise ValueError("router_data: name a file of safe and informative answers")
    sealing_keys(config.bundle)
    trained: dict[str, tuple[str, int | None]]
    trained = {f"expert_data.{domain}": (file, None) for domain, file in config.expert_data.items()}
    trained["router_data"] = config.router_data, config.limit
    if config.replay.data is not None and config.replay.weight:
        trained["replay.data"] = config.replay.data, None
    keys = {
        where: {prompt_key(row.messages[-1]["content"]) for row in read_rows(config, file, limit)[0]}
        for where, (file, limit) in trained.items()
    }
    if rows:
        asked = (row for found in read_domains(rows).values() for row in found)
        keys["expert_rows"] = {prompt_key(prompt_from_row(row).text) for row in asked}
    if config.evaluation_data:
        keys |= {f"expert {expert.domain}": trained_prompts(expert) for expert in given}
    for file in config.evaluation_data:
        for prompt in read_records(training_file(file), prompt_from_row, what="prompt", repeats="drop").records:
            if where := next((w for w, found in keys.items() if prompt_key(prompt.text) in found), None):
                raise ValueError(f"{where}: prompt {prompt.id} of {file} is in it too; evaluate on other prompts")


def trained_prompts(expert: Adapter) -> set[str]:
    """What an expert was asked in training, from the files that its run recorded and that are still the same."""
    found = set()
    for file, sha256 in expert.source["inputs"].items():
        if not sha256 or sha256_of(file) != sha256:
            continue
        for _, row, _, _ in scan_rows(file):
            with suppress(ValueError):  # a row that training left out
                found.add(prompt_key(prompt_from_row(row or {}).text))
    return found


def require_experts(config: SafeMoEConfig) -> list[Adapter]:
    """Refuse experts that cannot be mixed, as far as this shows without the base and before others are trained.

    Returns those that are there already.

    Raises:
        FileNotFoundError, ValueError: naming the expert and the field.
    """
    to_train = {stage.settings["domain"] for stage in stages(config)}
    if not config.experts and not to_train:
        raise ValueError(
            "experts: there are none; name runs or folders with experts=[...], or give expert_data or expert_rows"
        )
    if len(config.experts) + len(to_train) < 2:
        raise ValueError("experts: a gate needs at least two to choose among")
    adapters = [read_adapter(folder) for folder in config.experts]
    require_named_base(adapters, public_base(resolve(config.model))[0])
    layers = layers_of(adapters)
    if twice := to_train & {adapter.domain for adapter in adapters}:
        raise ValueError(f"expert {min(twice)}: domain: one of experts has it, and one to be trained; rename one")
    wanted = config.expert.lora.target_modules
    if layers and to_train and isinstance(wanted, list):
        theirs = sorted({name.rpartition(".")[2] for name in layers[0]})
        if theirs != sorted({name.rpartition(".")[2] for name in wanted}):
            raise ValueError(
                f"expert.lora.target_modules is {wanted}, and expert {adapters[0].domain} has {theirs}; all need the "
                "same layers"
            )
    return adapters


def prepare(config: SafeMoEConfig, policy: Policy) -> Data:
    """Read, tokenize and split the safe answers, and the rows to replay.

    Raises:
        FileNotFoundError, ValueError: wrong input, naming the row.
    """
    assert config.router_data is not None
    rows, dropped = read_rows(config, config.router_data, config.limit)
    tokens = tokenize(config, policy, rows, config.router_data, dropped)
    kept = {row.id: row for row in rows if row.id in tokens}
    prompts = {i: row.messages[-1]["content"] for i, row in kept.items()}
    held = hold_out_prompts(prompts, config.split.share, config.split.seed)
    ids = sorted(set(kept) - held)
    if not ids:
        raise ValueError(f"{config.router_data}: no answer is left to train on (split.share={config.split.share})")
    replay: list[Encoded] = []
    if config.replay.weight:
        assert config.replay.data is not None
        benign, _ = read_rows(config, config.replay.data)
        replay = list(tokenize(config, policy, benign, config.replay.data, {}).values())
    return Data(kept, tokens, ids, sorted(held), replay, dropped)


def tokenize(
    config: SafeMoEConfig, policy: Policy, rows: Iterable[LabelledCompletion], source: str, dropped: dict[str, int]
) -> dict[str, Encoded]:
    """Tokenize every prompt with its answer, by id; counts what is dropped.

    Raises:
        ValueError: naming the row.
    """
    found = {}
    for number, row in enumerate(rows, 1):
        try:
            encoded = encode(
                policy.tokenizer, row.messages, row.completion, max_length=config.max_length,
                max_prompt_length=config.max_prompt_length, fmt=format_of(policy.tokenizer, config.prompt_format),
                end_ids=policy.end_ids,
            )  # fmt: skip
            if encoded.completion_tokens < 1:
                raise ValueError(f"nothing of the answer is left within max_length={config.max_length}")
        except ValueError as error:
            if config.invalid == "error":
                raise ValueError(
                    f"{source}: row {number} (id {row.id}): {error}; fix it or set invalid=drop"
                ) from None
            dropped["unusable as tokens"] = dropped.get("unusable as tokens", 0) + 1
            continue
        found[row.id] = encoded
    return found
