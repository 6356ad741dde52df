"""Creating an object only if there is none, on stores that check conditions and on those that ignore them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from .client import S3_PROTOCOLS, Client
from .retry import response_of

log = logging.getLogger("keel.store")
SINGLE_PUT_BYTES = 4 * 2**30  # conditional writes go in one PUT: not all servers check the condition of a multipart one
SETTLE_SECONDS = 1.0  # where conditions are ignored: racing writers have written by then
_memory_lock = threading.Lock()  # memory:// has no atomic create of its own


def _put(fs: Any, protocol: str, key: str, body: bytes | bytearray) -> bool:
    """Write if there is none; False if the store refused."""
    try:
        if protocol in S3_PROTOCOLS:
            fs.pipe_file(key, body, mode="create", chunksize=SINGLE_PUT_BYTES)
        else:
            with _memory_lock:
                fs.pipe_file(key, body, mode="create")
    except Exception as error:
        if not isinstance(error, FileExistsError) and response_of(error)[0] != 412:
            raise
        return False
    return True


def create(
    held: Client, protocol: str, key: str, body: bytes | bytearray, n: int, sleep: Callable[[float], None]
) -> bool:
    """The `n`-th attempt (from 0) to create `key`; see `Store.create`."""
    fs, bucket = held.filesystem, key.split("/")[0]
    if n == 0 and fs.exists(key):
        return False
    if not _put(fs, protocol, key, body):
        held.conditional[bucket] = True
        # An earlier attempt of ours may have been carried out and its answer lost.
        return n > 0 and bytes(fs.cat_file(key)) == body
    if protocol not in S3_PROTOCOLS:
        return True
    if bucket not in held.conditional:
        # Ask for what must be refused now. It changes nothing: the content is the same.
        held.conditional[bucket] = not _put(fs, protocol, key, body)
        if not held.conditional[bucket]:
            log.warning(
                "s3://%s: this server ignores conditional writes (If-None-Match), so two runs that start within the same "
                "second may both take a place; start one at a time, or use another server",
                bucket,
            )
    if held.conditional[bucket]:
        return True
    sleep(SETTLE_SECONDS)  # the last of racing writers stays, and only that one finds its own content
    return bytes(fs.cat_file(key)) == body
