"""What is served: a loaded target, how it can be asked, and what it says of itself. Unsafe ones need their flag.

Refuses to know about HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tempering.api import load
from tempering.attacks.trained import PLAYER, find_trained, load_attacker
from tempering.core.decoding import Decoding
from tempering.core.policy import Policy
from tempering.core.quarantine import UnsafeExpertAccess, allow_unsafe_experts, require_override, require_safe
from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler, Sampler, ThinkSampler
from tempering.serving.settings import ServeConfig


@dataclass
class Target:
    """A target that answers requests."""

    name: str
    """What clients call it."""
    sampler: Any
    """The `Sampler` that answers, as it answers anywhere else."""
    local: LocalSampler | None
    """The sampler inside that has the weights."""
    think: ThinkSampler | None
    """The one that takes reasoning and answer apart, where it thinks first."""
    chooser: Any
    """The best-of-N sampler, where it is one."""
    raw: LocalSampler | None
    """Continues texts without the chat template."""
    in_steps: bool
    """Whether its answers are drawn token by token beside others; else whole calls of the sampler are."""
    routes: bool
    """Whether a gate chooses experts."""

    @property
    def buffers(self) -> str | None:
        """Why a stream brings the answer in one piece; `None` where it comes token by token."""
        if self.in_steps:
            return None
        if self.chooser is not None:
            return f"best of {self.chooser.config.n}: nothing is sent before all candidates are scored"
        return "this target answers in whole"

    def prompt_ids(self, prompt: Prompt) -> list[int] | None:
        """The tokens that an answer continues; `None` where they are not known here."""
        shown = self.sampler.shown(prompt) if hasattr(self.sampler, "shown") else prompt
        if self.local is not None:
            return list(self.local.prompt_ids(shown))
        return list(self.chooser.prompt_of(shown)[0]) if self.policy is not None else None

    @property
    def policy(self) -> Policy | None:
        """The weights whose template and context hold: those that answer, or that score what an endpoint drew."""
        if self.local is not None:
            return self.local.policy
        return None if self.chooser is None else self.chooser.policy

    @property
    def think_tokens(self) -> int:
        """Tokens of reasoning on top of an answer's length."""
        if self.think is not None:
            return self.think.think_tokens
        return int(getattr(getattr(self.sampler, "config", None), "think_tokens", 0) or 0)

    def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        kinds = {"reasoning": self.think is not None, "routing": self.routes, "candidates": self.chooser is not None}
        return {
            "streams": self.in_steps,
            "buffers": self.buffers,
            "logprobs": self.in_steps and self.think is None,
            "completions": self.raw is not None,
            **kinds,
        }


@contextmanager
def allowed(config: ServeConfig) -> Iterator[None]:
    """The first half of the override, where `unsafe_reason` gives it."""
    if config.unsafe_reason is None:
        yield
        return
    with allow_unsafe_experts(reason=config.unsafe_reason):
        yield


def open_target(reference: str, config: ServeConfig) -> Target:
    """Load what is to be served.

    Raises:
        ValueError, FileNotFoundError: wrong input.
        UnsafeExpertAccess: an attacker or another unsafe artefact, without its flag.
    """
    try:
        with allowed(config):
            path = Path(reference).expanduser()
            if path.exists():
                require_safe(path, "serving")
            if (path / PLAYER).is_file() and path.name.startswith("attacker"):
                sampler = _attacker(path, config)
            else:
                sampler = load(
                    reference, dtype=config.dtype, sampler=config.sampler, attribution=config.attribution,
                    policy=config.policy, probe_subtract=config.probe_subtract, **config.endpoint.model_dump(),
                )  # fmt: skip
    except UnsafeExpertAccess as error:
        raise UnsafeExpertAccess(f"{error}; of `temper serve`, unsafe_reason=TEXT is the first half") from None
    return describe(reference, sampler, config)


def _attacker(folder: Path, config: ServeConfig) -> Sampler:
    """An attacker, an adapter or whole weights, each of whose answers needs the override."""
    require_override(f"serving the attacker {folder}")
    if config.sampler:
        raise ValueError(f"sampler={config.sampler}: an attacker is served as it is")
    sampler = load_attacker(find_trained(str(folder)), dtype=config.dtype)
    sampler.policy.source = replace(sampler.policy.source, unsafe=True)
    return sampler


def describe(reference: str, sampler: Sampler, config: ServeConfig) -> Target:
    """Find out how a sampler can be asked.

    Raises:
        ValueError: `think_tokens` for a target that does not think.
    """
    chain = _chain(sampler)
    local = next((s for s in chain if isinstance(s, LocalSampler)), None)
    think = next((s for s in chain if isinstance(s, ThinkSampler)), None)
    if config.think_tokens is not None:
        if think is None:
            raise ValueError(f"think_tokens={config.think_tokens}: {reference} does not think before it answers")
        think.think_tokens = config.think_tokens
    in_steps = isinstance(sampler, LocalSampler | ThinkSampler) and local is not None and Decoding.fits(local)
    raw = None
    if isinstance(sampler, LocalSampler) and in_steps and not sampler.changes_states:
        raw = LocalSampler(sampler.policy, fmt="raw", name=sampler.name)
    name = config.name or (Path(reference).name if Path(reference).exists() else reference)
    return Target(
        name=name.removeprefix("openai:").partition("@http")[0],
        sampler=sampler,
        local=local,
        think=think,
        chooser=next((s for s in chain if hasattr(s, "keep")), None),
        raw=raw,
        in_steps=in_steps,
        routes=isinstance(sampler, LocalSampler) and sampler.policy.routing is not None,
    )


def _chain(sampler: Any) -> list[Any]:
    """A sampler, and those inside it."""
    found = [sampler]
    while hasattr(found[-1], "inner"):
        found.append(found[-1].inner)
    return found
