"""What clients send and get: OpenAI's chat completions and completions, with an object `tempering` of our own.

A field that we cannot honour is taken at the value that changes nothing, and is an error at any other. Refuses to
know how a request is answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_STOPS, LONGEST_STOP, MOST_TOP = 16, 256, 20
MOST_TURNS, MOST_PARTS, MOST_PROMPTS, MOST_TOKENS = 4096, 256, 4096, 1 << 20
MOST_FIELDS = 64
"""Of one object; with `fail_fast` in lists it bounds how many faults are found in one body: each costs time."""

Text = Annotated[str, Field(max_length=1 << 24)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MOST_FIELDS:
            raise ValueError(f"at most {MOST_FIELDS} fields in an object")
        return given


class Part(_Body):
    """A part of a turn; only text is read."""

    type: Literal["text"]
    text: Text


class Turn(_Body):
    """One turn of a conversation; a last one by the assistant is the beginning of the answer, and is continued."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    """None: tools are not called here."""

    def plain(self) -> dict[str, str]:
        """Role and text, as a prompt has them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Details(_Body):
    """Ask for what the method did; with the official client `extra_body={"tempering": {...}}`."""

    candidates: bool = False
    """All candidates of a best-of-N target with risk, validity and flags, and which one won."""
    routing: bool = False
    """The experts and weights that the gate of a SafeMoE target chose for every token."""


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool = False
    """Send a last event with the usage and no choices."""
    include_obfuscation: bool = False
    """Taken, and not done."""


class TextFormat(_Body):
    """The only form of answers."""

    type: Literal["text"]


class _Ask(_Body):
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """The served model's name; null: the one that there is."""
    n: int | None = Field(None, ge=1)
    """Answers to each prompt."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus of sampling."""
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    """Same seed, same request, same answer, whatever else is asked at the time; null: another answer each time."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    """The answer ends before the first of these texts."""
    stream: bool | None = None
    """Server-sent events."""
    stream_options: StreamOptions | None = None
    tempering: Details | None = None
    """Details of our methods."""
    frequency_penalty: Zero | None = None
    """0: answers are not penalised."""
    presence_penalty: Zero | None = None
    """0: answers are not penalised."""
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    """Empty: logits are not changed."""
    user: Text | None = None
    """Taken, and not kept."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Ask):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_TURNS, fail_fast=True)]
    """The conversation."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer, in tokens; of a model that thinks first, its reasoning not counted."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Log-probabilities of the tokens of the answer."""
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    """So many of the most likely tokens beside each."""
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    """Empty: tools are not called here."""
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    """Taken: there are no tools."""
    modalities: Annotated[list[Literal["text"]], Field(max_length=4)] | None = None
    metadata: dict[str, Any] | None = None
    """Taken, and not kept."""
    store: Literal[False] | None = None
    """False: nothing is stored."""
    service_tier: Text | None = None
    """Taken: there is one."""

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens and max_completion_tokens differ; send one")
        return self

    @property
    def length(self) -> int | None:
        """The longest answer, under whichever name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many tokens are scored beside the one taken; `None`: no scores."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Ask):
    """`POST /v1/completions`: continue a text, without the chat template."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    """A text, several, or their tokens."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest continuation, in tokens."""
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    """So many of the most likely tokens beside each."""
    echo: Literal[False] | None = None
    """False: the prompt is not repeated."""
    suffix: Literal[""] | None = None
    best_of: int | None = Field(None, ge=1)
    """As many as `n`: a best-of-N target chooses by itself."""

    @field_validator("prompt")
    @classmethod
    def _has_text(cls, value: Any) -> Any:
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError("is empty")
        return value

    @model_validator(mode="after")
    def _no_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: send n, or nothing; a best-of-N target chooses by itself")
        return self

    @property
    def length(self) -> int | None:
        """The longest continuation."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many tokens are scored beside the one taken; `None`: no scores."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)
