"""What the server counts, in Prometheus' format. Labels are words of this server, never of a client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "tempering"}
        self.requests = Counter("requests", "Requests, by route and status", ["route", "status"], **kept)
        self.seconds = Histogram(
            "request_seconds", "From a request to the end of its reply", ["route"], buckets=SECONDS, **kept
        )
        self.first = Histogram(
            "time_to_first_token_seconds", "From a request to its first text", buckets=SECONDS, **kept
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts that were answered", **kept)
        self.completion_tokens = Counter(
            "completion_tokens", "Tokens drawn for answers, candidates and reasoning included", **kept
        )
        self.dropped = Counter("dropped", "Requests whose work was dropped", ["why"], **kept)
        self.under_way = Gauge("requests_under_way", "Requests that wait or are answered", **kept)
        self.rows = Gauge("rows", "Answers that are written at this moment", **kept)

    def count(self, usage: Mapping[str, Any], first_s: float | None) -> None:
        """Count a request that was answered; `first_s`: seconds to its first text, where there was any."""
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.completion_tokens.inc(usage["completion_tokens"])
        if first_s is not None:
            self.first.observe(first_s)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
