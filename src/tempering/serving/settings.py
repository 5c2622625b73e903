"""Settings of `temper serve`: where it listens, what it serves, and what it grants one request.

Refuses to know how any of it is enforced.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tempering.core.config import Config
from tempering.core.endpoint import EndpointConfig
from tempering.core.loading import Dtype

LEAST_TOKEN = 16
"""Characters of a token, where the server listens to other machines."""


class ServeConfig(Config):
    """Settings of `temper serve`."""

    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs a token."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0: any that is free, which is printed."""
    name: str | None = None
    """What clients call the model; null: the last part of the target's path, or the target."""
    token_env: str = "TEMPER_SERVE_TOKEN"
    """Name of the environment variable with the token that clients must send; where it is not set, none is asked."""
    token_file: str | None = None
    """File with the token, in place of the variable."""
    hosts: list[str] = Field(default_factory=list)
    """Names under which browsers may reach a server without a token, beside those of the loopback interface."""
    dtype: Dtype = "auto"
    """Type of the weights; in float32 no answer depends on what it is batched with."""
    sampler: Literal["attribution", "policy", "probe_subtract"] | None = None
    """How answers are made: best of several candidates, policies in the prompt, probes subtracted."""
    attribution: dict[str, Any] = Field(default_factory=dict)
    """Settings of `sampler=attribution` (docs/attribution.md)."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Settings of `sampler=policy` (docs/deliberative.md)."""
    probe_subtract: dict[str, Any] = Field(default_factory=dict)
    """Settings of `sampler=probe_subtract` (docs/unlearning.md)."""
    endpoint: EndpointConfig = EndpointConfig()
    """How a target `openai:MODEL@URL`, or an `attribution.generator`, is asked, and what it may cost."""
    think_tokens: int | None = Field(None, ge=1)
    """Longest reasoning of a target that thinks first, in tokens; null: what it was trained with."""
    unsafe_reason: str | None = None
    """Why an attacker or another unsafe artefact is served: the first half of the override that this needs."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Of requests that name none; null: 1, as in OpenAI's protocol, and what it was calibrated with for best of N."""
    default_max_tokens: int = Field(256, ge=1)
    """Length of an answer where a request names none, in tokens."""
    max_tokens: int = Field(2048, ge=1)
    """Longest answer that a request may ask for, in tokens."""
    max_n: int = Field(16, ge=1)
    """Most answers that a request may ask for."""
    max_prompts: int = Field(16, ge=1)
    """Most prompts in one request to /v1/completions."""
    max_body_bytes: int = Field(1 << 20, ge=1)
    """Longest body of a request, in bytes."""
    max_queue: int = Field(256, ge=1)
    """Most requests that wait or are answered at a time; more get 429."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds that a request may take, waiting included."""
    read_timeout_s: float = Field(20.0, gt=0)
    """Seconds for a client to send its body, and to take each part of a stream."""
    keepalive_s: float = Field(10.0, gt=0)
    """A stream says nothing for at most so many seconds; then it sends a comment."""
    grace_s: float = Field(30.0, ge=0)
    """Seconds that running requests have to end after SIGTERM; new ones get 503."""
    batch_rows: int = Field(64, ge=1)
    """Most answers that are written at a time."""
    batch_tokens: int = Field(16_384, ge=1)
    """Most tokens of prompts and answers that are in memory for them, padding included."""

    def token(self) -> str | None:
        """Read the token that clients must send; `None` where there is none.

        Raises:
            FileNotFoundError, ValueError: the file is not there, is empty, or the variable is.
        """
        if self.token_file is not None:
            found = Path(self.token_file).expanduser().read_text(encoding="utf-8").strip()
            where = self.token_file
        elif self.token_env in os.environ:
            found, where = os.environ[self.token_env].strip(), f"the environment variable {self.token_env}"
        else:
            return None
        if not found or any(ord(c) <= 32 or ord(c) > 126 for c in found):
            raise ValueError(f"{where}: a token is some printable ASCII characters without spaces")
        return found

    def require_guarded(self, token: str | None) -> None:
        """Refuse to listen to other machines without a token.

        Raises:
            ValueError: saying how to give one.
        """
        if is_loopback(self.host):
            return
        if token is None:
            raise ValueError(
                f"host={self.host} listens to other machines, and no token guards it: set {self.token_env} in the "
                "environment or token_file=FILE, or leave host=127.0.0.1"
            )
        if len(token) < LEAST_TOKEN:
            raise ValueError(
                f"host={self.host} listens to other machines, and the token has {len(token)} characters: give at "
                f"least {LEAST_TOKEN}, for instance of `openssl rand -hex 32`"
            )


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches an address.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.org", "")]
    [True, True, True, False, False, False, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
