"""From a request's body to an `Ask`: every limit is checked here, before anything waits for the model.

Refuses to know how the body came and how the answer goes.
"""

from __future__ import annotations

import uuid

from tempering.core.records import Prompt, content_id
from tempering.core.sampling import context_of
from tempering.serving.errors import ApiError
from tempering.serving.jobs import Ask
from tempering.serving.schema import ChatRequest, CompletionRequest
from tempering.serving.settings import ServeConfig
from tempering.serving.target import Target

LEAST_TEMPERATURE = 1e-6
"""Below it logits overflow, and sampling is greedy but for ties."""


def prepare(target: Target, config: ServeConfig, body: ChatRequest | CompletionRequest) -> Ask:
    """Check a request against this target and these limits, and encode its prompts.

    Raises:
        ApiError: 400 naming the field, or 404 for another model.
    """
    if body.model is not None and body.model != target.name:
        raise ApiError(
            404, "there is no such model here; GET /v1/models names the one that there is", param="model",
            code="model_not_found",
        )  # fmt: skip
    n = body.n or 1
    if n > config.max_n:
        raise _invalid("n", f"at most {config.max_n} answers a request")
    if body.length is not None and body.length > config.max_tokens:
        raise _invalid("max_tokens", f"at most {config.max_tokens} tokens an answer")
    _require_able(target, body)
    temperature = body.temperature
    if temperature is None:  # best of N draws at the temperature that it was calibrated with where none is asked for
        temperature = config.temperature if config.temperature is not None else float(target.chooser is None)
    if temperature < LEAST_TEMPERATURE:
        temperature = 0.0
    is_raw = isinstance(body, CompletionRequest)
    # Without a seed each request is another draw: its samples are keyed by a name that no other request has. Greedy
    # answers, and best of N at its own temperature, are those of the target anywhere else.
    unique = uuid.uuid4().hex if body.seed is None and temperature else None
    prompts, ids = _completion_prompts(target, config, body) if is_raw else _chat_prompt(target, body)
    if unique is not None:
        prompts = [Prompt(p.messages, id=f"{unique}-{i}") for i, p in enumerate(prompts)]
    return Ask(
        prompts=tuple(prompts), ids=tuple(ids), n=n, temperature=temperature, seed=body.seed or 0, stops=body.stops,
        max_new_tokens=_length(target, config, body.length, max(map(len, ids))), is_raw=is_raw,
        top_p=1.0 if body.top_p is None else body.top_p, top_logprobs=body.top,
        candidates=bool(body.tempering and body.tempering.candidates),
        routing=bool(body.tempering and body.tempering.routing),
    )  # fmt: skip


def _require_able(target: Target, body: ChatRequest | CompletionRequest) -> None:
    """Refuse what this kind of target cannot give."""
    if isinstance(body, CompletionRequest) and target.raw is None:
        raise ApiError(400, "this target answers conversations only: ask /v1/chat/completions", code="chat_only")
    if body.top is not None and not (target.in_steps and target.think is None):
        why = "of a model that thinks first" if target.in_steps else "of an answer that was chosen as a whole"
        raise _invalid("logprobs", f"there are none {why}; leave it out")
    details = body.tempering
    if details is not None and details.candidates and target.chooser is None:
        raise _invalid("tempering.candidates", "this target does not choose among candidates; leave it out")
    if details is not None and details.routing and not target.routes:
        raise _invalid("tempering.routing", "this target has no gate; leave it out")
    if details is not None and details.routing and body.top is not None:
        raise _invalid("logprobs", "not beside a trace of routing; ask twice")


def _chat_prompt(target: Target, body: ChatRequest | CompletionRequest) -> tuple[list[Prompt], list[list[int]]]:
    assert isinstance(body, ChatRequest)
    prompt = Prompt(tuple(turn.plain() for turn in body.messages))
    try:
        return [prompt], [target.prompt_ids(prompt) or []]
    except ValueError as error:
        raise _invalid("messages", str(error)) from None


def _completion_prompts(
    target: Target, config: ServeConfig, body: ChatRequest | CompletionRequest
) -> tuple[list[Prompt], list[list[int]]]:
    assert isinstance(body, CompletionRequest) and target.raw is not None
    given = body.prompts()
    if len(given) > config.max_prompts:
        raise _invalid("prompt", f"at most {config.max_prompts} prompts a request")
    tokenizer = target.raw.policy.tokenizer
    prompts: list[Prompt] = []
    ids: list[list[int]] = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append(Prompt(({"role": "user", "content": prompt},)))
            ids.append(target.raw.prompt_ids(prompts[-1]))
            continue
        if max(prompt) >= target.raw.policy.base.config.vocab_size:
            raise _invalid("prompt", "a token is not in this model's vocabulary")
        if body.tempering is not None and body.tempering.routing:
            raise _invalid("prompt", "a trace of routing needs a text, not tokens")
        text = tokenizer.decode(prompt)
        prompts.append(Prompt(({"role": "user", "content": text},), id=content_id(prompt)))
        ids.append(list(prompt))
    if not all(ids):
        raise _invalid("prompt", "holds no token")
    return prompts, ids


def _length(target: Target, config: ServeConfig, asked: int | None, prompt_tokens: int) -> int:
    """The longest answer, where prompt, reasoning and answer fit into the model's context."""
    wanted = asked or min(config.default_max_tokens, config.max_tokens)
    if target.policy is None:  # the endpoint knows, and says so
        return wanted
    context = context_of(target.policy)
    room = context - prompt_tokens - target.think_tokens
    if room < (wanted if asked else 1):
        thinking = f" and {target.think_tokens} of reasoning" if target.think_tokens else ""
        raise ApiError(
            400, f"the prompt has {prompt_tokens} tokens{thinking}; with max_tokens={wanted} that exceeds the "
            f"model's context of {context}; shorten it or lower max_tokens", param="messages",
            code="context_length_exceeded",
        )  # fmt: skip
    return min(wanted, room)


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
