"""Whom an attack may be sent to: this machine always, others only with the user's word and a cap. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tempering.core.endpoint import parse_endpoint


def remote_hosts(targets: Sequence[str]) -> list[str]:
    """Return the hosts of targets that are endpoints on other machines, by how their URLs are written.

    >>> remote_hosts(["smollm2", "openai:m@http://127.0.0.1:8000/v1", "openai:m@https://example.org/v1"])
    ['example.org']
    """
    endpoints = [parse_endpoint(target) for target in targets if target.startswith("openai:")]
    return list(dict.fromkeys(e.host for e in endpoints if not e.is_loopback))


def require_authorised(targets: Sequence[str], *, authorised: bool, has_cap: bool, cap: str) -> list[str]:
    """Refuse to attack another machine without the user's word and a cap; nothing is connected to, no name looked up.

    Returns the hosts that are authorised.

    Raises:
        ValueError: naming the host, and what is missing.
    """
    hosts = remote_hosts(targets)
    if not hosts:
        return []
    missing = [] if authorised else ["authorised=true"]
    missing += [] if has_cap else [f"a cap ({cap})"]
    if missing:
        raise ValueError(
            f"{hosts[0]} is not this machine: attacks are sent there only with {' and '.join(missing)}; "
            "give it where you are allowed to test that service"
        )
    return hosts


def authorisation(hosts: Sequence[str], cap: Mapping[str, Any]) -> dict[str, Any]:
    """Return what provenance says of hosts that were authorised, and of the cap that was given for them."""
    return {"hosts": list(hosts), "by": "authorised=true", "cap": dict(cap)}
