"""The server's log: a line an event on stderr, of this server's own words alone.

Refuses prompts, answers, keys, addresses and paths that a client made up: what is not passed in is not written.
"""

from __future__ import annotations

import sys
import time


def log(text: str) -> None:
    """Write a line with the time, in UTC."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f"{stamp} {text}", file=sys.stderr, flush=True)
