"""Names and plain values: how URLs are joined, and the one JSON text of a value."""

from __future__ import annotations

import json
from typing import Any


def join_url(base: str, *parts: str) -> str:
    """`base` and `parts` joined by single slashes; the scheme's `//` is left alone."""
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    if not tail:
        return base
    return base + tail if base.endswith("://") else f"{base.rstrip('/')}/{tail}"


def checked(path: str) -> str:
    """A path relative to a store, as it is; ValueError for one that leads out of it."""
    if path.startswith("/") or "://" in path or ".." in path.split("/"):
        raise ValueError(f"path={path!r}: must be relative to the store, without '..'")
    return path


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; equal values give equal bytes. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
