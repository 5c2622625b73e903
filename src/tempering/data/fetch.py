"""Files that authors of data sets publish at an address of their own, downloaded once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from tempering.core.run import atomic_write

COMMIT = re.compile(r"/[0-9a-f]{40}/")
TIMEOUT_S = 60.0


def fetched(address: str) -> Path:
    """Return the file at an address; one that names a commit never changes, and is not asked for again.

    Raises:
        ConnectionError: `HF_HUB_OFFLINE`, which keeps other data sets offline too, is set.
        httpx.HTTPError: it cannot be had.
    """
    import httpx

    from tempering.core.loading import cache_dir

    folder = hashlib.sha256(address.encode("utf-8")).hexdigest()[:16]
    path = cache_dir() / "datasets" / folder / address.rpartition("/")[2]
    if path.is_file() and COMMIT.search(address):
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConnectionError("HF_HUB_OFFLINE is set")
    reply = httpx.get(address, follow_redirects=True, timeout=TIMEOUT_S)
    reply.raise_for_status()
    return atomic_write(path, reply.content)
