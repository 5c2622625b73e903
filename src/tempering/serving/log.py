"""The server's log: a line an event on stderr, of this server's own words alone.

Refuses prompts, answers, keys, addresses and paths that a client made up: what is not passed in is not written.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress


def log(text: str) -> None:
    """Write a line with the time, in UTC, where there is still someone to read it."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(OSError, ValueError):  # stderr is closed, or a pipe that nobody reads: the server goes on
        print(f"{stamp} {text}", file=sys.stderr, flush=True)
