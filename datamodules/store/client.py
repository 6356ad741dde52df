"""One fsspec client per process, protocol and options.

A client holds sockets and an event loop, neither of which survives a fork: a child that used its parent's client would
read answers meant for the parent. So clients are keyed by process id (and by options and the AWS_* environment) and never pickled; those inherited through a fork
are kept but never used nor closed (closing them would touch the parent's event loop).
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from typing import Any

from .errors import StoreError

S3_PROTOCOLS = ("s3", "s3a")


@dataclass
class Client:
    """A filesystem, and whether its endpoint has ever answered."""

    filesystem: Any
    reached: bool = False


_clients: dict[tuple[int, str], Client] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it at the fork


os.register_at_fork(after_in_child=_renew_lock)


def client(protocol: str, options: dict[str, Any], url: str) -> Client:
    """The client of this process for (protocol, options, environment), created on first use."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))  # they may change meanwhile
    key = (os.getpid(), json.dumps([protocol, options, settings], sort_keys=True, default=repr))
    found = _clients.get(key)
    if found is None:
        with _lock:
            found = _clients.get(key)
            if found is None:
                found = _clients[key] = Client(_filesystem(protocol, options, url))
    return found


def _filesystem(protocol: str, options: dict[str, Any], url: str) -> Any:
    import fsspec

    keywords = {"skip_instance_cache": True, "use_listings_cache": False, **options}
    if protocol in S3_PROTOCOLS:
        keywords = _s3_options(keywords)
    else:
        for name in ("connect_timeout", "read_timeout", "concurrency"):
            keywords.pop(name, None)
    try:
        filesystem = fsspec.filesystem(protocol, **keywords)
    except ImportError as error:
        extra = "pip install 'keel[s3]'" if protocol in S3_PROTOCOLS else str(error)
        raise StoreError(f"{url}: no client for {protocol}:// is installed; {extra}") from error
    except ValueError as error:
        raise StoreError(f"{url}: {error}; use a path, file://, s3:// or memory://") from error
    if protocol in S3_PROTOCOLS:
        filesystem.retries = 1  # retrying is done in one place, see retry.py
    return filesystem


def _s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """s3fs keywords: bounded waits, no inner retries, enough connections, and what S3-compatible servers need."""
    keywords = dict(options)
    config = dict(keywords.pop("config_kwargs", {}))
    config.setdefault("connect_timeout", keywords.pop("connect_timeout", 5.0))
    config.setdefault("read_timeout", keywords.pop("read_timeout", 30.0))
    config.setdefault("max_pool_connections", keywords.pop("concurrency", 32))
    config.setdefault("retries", {"total_max_attempts": 1})
    endpoint = (
        keywords.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    if endpoint:
        # Servers other than AWS rarely resolve bucket host names, and some send the checksum of the whole object with
        # a range of it. Keel checks its own checksums.
        config.setdefault("s3", {"addressing_style": "path"})
        for name in ("request_checksum_calculation", "response_checksum_validation"):
            if f"AWS_{name.upper()}" not in os.environ:
                config.setdefault(name, "when_required")
    return {**keywords, "config_kwargs": config}
