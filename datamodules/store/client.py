"""One fsspec client per process, protocol and options.

A client holds sockets and an event loop, neither of which survives a fork: a child that used its parent's client would
read answers meant for the parent. So clients are keyed by process id (and by options and the AWS_* environment) and never pickled; those inherited through a fork
are kept but never used nor closed (closing them would touch the parent's event loop).
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .direct import SIGNED_SECONDS, DirectReads, Part, Tags, compare_tag, unsupported
from .errors import StoreError
from .retry import SKEWED, is_transient, response_of
from .sign import Keys, Signer
from .wire import Sink

log = logging.getLogger("keel.store")
S3_PROTOCOLS = ("s3", "s3a")
CONCURRENCY = 32  # requests in flight


@dataclass
class Client:
    """A filesystem and what this process has learnt about its endpoint.

    Attributes:
        reached: it has answered once.
        direct: reads past the filesystem, where the options allow it; None otherwise.
        conditional: bucket -> whether conditional writes hold there; buckets not yet asked are absent.
    """

    filesystem: Any
    reached: bool = False
    direct: DirectReads | None = None
    direct_worked: bool = False
    conditional: dict[str, bool] = field(default_factory=dict)

    def read_parts(
        self, parts: Sequence[Part], concurrency: int, sinks: Sequence[Sink] | None = None, tags: Tags | None = None
    ) -> list[bytes | int | BaseException]:
        """The bytes of each part (with sinks, which get them: their number), or what went wrong with it.

        With ``tags``, ETags that were seen before, an object that has another one by now is `Changed`.
        """
        direct = self.direct
        if direct is None:
            return self._through_filesystem(parts, concurrency, sinks, tags)
        results: list[Any] = direct.get(parts, sinks, tags)
        refused = [i for i, result in enumerate(results) if isinstance(result, BaseException) and _refusal(result)]
        if len(refused) < len(parts):
            self.direct_worked = True
        if refused:
            # Perhaps its signature is too old, or this server takes no signed URLs: s3fs has the last word.
            for i in refused:
                direct.forget(parts[i][0])
            theirs = [sinks[i] for i in refused] if sinks else None
            again = self._through_filesystem([parts[i] for i in refused], concurrency, theirs, tags)
            for i, result in zip(refused, again, strict=True):
                if not isinstance(result, BaseException) and not self.direct_worked and self.direct is not None:
                    self.direct = None
                    log.warning("reading through s3fs, which is slower: a signed URL was refused (%s)", results[i])
                results[i] = result
        return results

    def _through_filesystem(
        self, parts: Sequence[Part], concurrency: int, sinks: Sequence[Sink] | None, tags: Tags | None
    ) -> list[bytes | int | BaseException]:
        if len(parts) == 1 and parts[0][1:] == (0, None):  # no range: an empty object has none
            try:
                found: list[Any] = [bytes(self.filesystem.cat_file(parts[0][0]))]
            except Exception as error:
                return [error]
        else:
            keys, starts, ends = [part[0] for part in parts], [part[1] for part in parts], [part[2] for part in parts]
            batch = {"batch_size": concurrency} if getattr(self.filesystem, "async_impl", False) else {}
            found = self.filesystem.cat_ranges(keys, starts, ends, on_error="return", **batch)
        for i, (sink, (_, start, end)) in enumerate(zip(sinks or (), parts, strict=False)):
            if not isinstance(found[i], BaseException) and (end is None or len(found[i]) == end - start):
                sink(0, memoryview(found[i]))
                found[i] = len(found[i])
        return found if tags is None else self._compared(parts, found, tags)

    def _compared(self, parts: Sequence[Part], found: list[Any], tags: Tags) -> list[bytes | int | BaseException]:
        """Asks for ETags after the bytes came: an object that was replaced before that has its new one by now."""
        faults: dict[str, BaseException] = {}
        for key in {part[0] for part in parts}:
            try:
                info = self.filesystem.info(key)
                compare_tag(tags, key, info.get("ETag") or info.get("etag"))
            except Exception as error:
                faults[key] = error
        return [
            result if isinstance(result, BaseException) else faults.get(part[0], result)
            for part, result in zip(parts, found, strict=True)
        ]


def _refusal(error: BaseException) -> bool:
    """An answer that s3fs might not get: neither a fault that passes nor about the object itself. A URL that was signed while
    the clock was wrong stays wrong."""
    status, code = response_of(error)
    return bool(status) and status not in (404, 416) and (code == SKEWED or not is_transient(error))


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
                filesystem = _filesystem(protocol, options, url)
                direct = _direct(filesystem, options) if protocol in S3_PROTOCOLS else None
                found = _clients[key] = Client(filesystem, direct=direct)
    return found


def configured(protocol: str) -> dict[str, Any]:
    """Options from fsspec's configuration (its files, and FSSPEC_* of the environment when it was imported).

    The section of the protocol has those of the filesystem, the section `keel` those of `Store` itself, which no
    filesystem knows.
    """
    from fsspec.config import conf

    return {**conf.get("keel", {}), **conf.get(protocol, {})}


def _filesystem(protocol: str, options: dict[str, Any], url: str) -> Any:
    import fsspec

    keywords = {"skip_instance_cache": True, "use_listings_cache": False, **options}
    if protocol in S3_PROTOCOLS:
        keywords = _s3_options(keywords)
    else:
        for name in ("connect_timeout", "read_timeout", "concurrency", "direct"):
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
    keywords = {name: value for name, value in options.items() if name != "direct"}
    config = dict(keywords.pop("config_kwargs", {}))
    config.setdefault("connect_timeout", keywords.pop("connect_timeout", 5.0))
    config.setdefault("read_timeout", keywords.pop("read_timeout", 30.0))
    config.setdefault("max_pool_connections", keywords.pop("concurrency", CONCURRENCY))
    config.setdefault("retries", {"total_max_attempts": 1})
    region = os.environ.get("AWS_REGION")
    if region and "region_name" not in config:  # which botocore, unlike the other SDKs, does not read
        keywords["client_kwargs"] = {"region_name": region, **(keywords.get("client_kwargs") or {})}
    if not keywords.get("anon"):
        config.setdefault("signature_version", "s3v4")  # else URLs for us-east-1 are signed the old way
    if _endpoint(keywords):
        # Servers other than AWS rarely resolve bucket host names, and some send the checksum of the whole object with
        # a range of it. Keel checks its own checksums.
        config.setdefault("s3", {"addressing_style": "path"})
        for name in ("request_checksum_calculation", "response_checksum_validation"):
            if f"AWS_{name.upper()}" not in os.environ:
                config.setdefault(name, "when_required")
    return {**keywords, "config_kwargs": config}


def _endpoint(options: dict[str, Any]) -> str:
    """The endpoint that is not AWS itself; empty for AWS."""
    settings = {**(options.get("client_kwargs") or {}), **options}
    named = settings.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return str(named or "")


def _secret(filesystem: Any) -> str:
    """The secret key that an s3fs filesystem signs with now; empty without any."""
    from fsspec.asyn import sync

    async def current() -> str:
        await filesystem.set_session()
        found = await filesystem.session.get_credentials()
        return str((await found.get_frozen_credentials()).secret_key) if found else ""

    return str(filesystem.secret or sync(filesystem.loop, current))


def _direct(filesystem: Any, options: dict[str, Any]) -> DirectReads | None:
    if not options.get("direct", True):
        return None
    reason = unsupported(options, _endpoint(options))
    if reason:
        log.info("reading through s3fs, which is slower: %s", reason)
        return None
    signer = Signer(
        lambda key: str(filesystem.url(key, expires=SIGNED_SECONDS)),
        lambda: _secret(filesystem),
        SIGNED_SECONDS,
        Keys.given(options, _endpoint(options)),
    )
    return DirectReads(
        signer,
        concurrency=int(options.get("concurrency", CONCURRENCY)),
        connect_timeout=float(options.get("connect_timeout", 5.0)),
        read_timeout=float(options.get("read_timeout", 30.0)),
        verify=(options.get("client_kwargs") or {}).get("verify", True),
    )
