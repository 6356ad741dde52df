"""Signed URLs of many objects at the price of one: Signature Version 4 in the query of a URL.

botocore takes a millisecond for a URL, most of it to find out the endpoint again, which is a part of what a small range
costs. So it signs one URL per bucket, and those of other objects there are made after that model: they differ in path and
signature. Our signature of its own URL must be the one that it has; where it is not, botocore signs each.

A client of botocore takes a tenth of a second to make, for its models of the service. Where keys, region and endpoint are
given as such, there is nothing that it would find out: then botocore's signature is asked for without a client.

https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

MODEL_SECONDS = 600.0  # for so long a model is used: credentials may change
_NAME = "keel"  # of the object whose URL is the model; nobody asks for it
_ALGORITHM = "AWS4-HMAC-SHA256"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9-]+")  # that is one: no access point, nothing to quote
_PORTS = {"http": 80, "https": 443}
_MATTER = ("PROFILE", "DEFAULT_PROFILE", "IGNORE_CONFIGURED_ENDPOINT_URLS", "CREDENTIAL_EXPIRATION")
_NO_MATTER = {"direct", "concurrency", "connect_timeout", "read_timeout"}


def host_of(url: SplitResult) -> str:
    """What the header Host says, as it is signed: in small letters, without a port that goes without saying."""
    name = url.hostname or ""
    host = f"[{name}]" if ":" in name else name
    return f"{host}:{url.port}" if url.port and url.port != _PORTS.get(url.scheme) else host


class Model:
    """The URL that botocore signed for the object ``_NAME``; raises ValueError if others cannot be made after it."""

    def __init__(self, url: str, secret: str) -> None:
        parts = urlsplit(url)
        self._host, self._path = host_of(parts), parts.path.removesuffix(_NAME)
        if not parts.path.endswith(f"/{_NAME}"):
            raise ValueError("the path does not end with the object's name")
        self._origin, self._query = f"{parts.scheme}://{parts.netloc}", ""
        if not parts.query:  # of a bucket for all
            return
        fields = dict(pair.partition("=")[::2] for pair in parts.query.split("&"))
        theirs = fields.pop("X-Amz-Signature", "")
        if fields.get("X-Amz-Algorithm") != _ALGORITHM or fields.get("X-Amz-SignedHeaders") != "host":
            raise ValueError("signed in another way")
        self._query = "&".join(f"{name}={value}" for name, value in sorted(fields.items()))
        self._date = fields["X-Amz-Date"]
        scope = unquote(fields["X-Amz-Credential"]).rsplit("/", 4)[1:]
        self._scope, self._key = "/".join(scope), f"AWS4{secret}".encode()
        for part in scope:
            self._key = hmac.digest(self._key, part.encode(), "sha256")
        if not hmac.compare_digest(self._signature(parts.path), theirs):
            raise ValueError("signed with another key")

    def url(self, name: str) -> str:
        """The URL of the object ``name`` of the bucket."""
        path = self._path + quote(name, safe="/~")
        signature = f"?{self._query}&X-Amz-Signature={self._signature(path)}" if self._query else ""
        return f"{self._origin}{path}{signature}"

    def _signature(self, path: str) -> str:
        request = f"GET\n{path}\n{self._query}\nhost:{self._host}\n\nhost\nUNSIGNED-PAYLOAD"
        digest = hashlib.sha256(request.encode()).hexdigest()
        return hmac.new(
            self._key, f"{_ALGORITHM}\n{self._date}\n{self._scope}\n{digest}".encode(), "sha256"
        ).hexdigest()


class Keys(NamedTuple):
    """What a URL of a server other than AWS is signed with."""

    key: str
    secret: str
    token: str
    region: str
    endpoint: str

    def __repr__(self) -> str:
        return f"Keys({self.key!r}, {self.endpoint!r})"  # without what nobody else may know

    @classmethod
    def given(cls, options: Mapping[str, Any], endpoint: str) -> Keys | None:
        """Those of s3fs's options or else of the environment; ``None`` where s3fs would look elsewhere as well, or has an
        option that may change what it signs."""
        client, environment = options.get("client_kwargs") or {}, os.environ
        known = {*_NO_MATTER, "key", "secret", "token", "endpoint_url", "client_kwargs"}
        if set(options) - known or set(client) - {"endpoint_url", "region_name", "verify"}:
            return None
        if not endpoint or urlsplit(endpoint).path not in ("", "/") or urlsplit(endpoint).query:
            return None
        config = os.path.expanduser(environment.get("AWS_CONFIG_FILE") or "~/.aws/config")
        if os.path.exists(config) or any(environment.get(f"AWS_{name}") for name in _MATTER):
            return None
        own = [str(options.get(name) or "") for name in ("key", "secret", "token")]
        token = environment.get("AWS_SECURITY_TOKEN") or environment.get("AWS_SESSION_TOKEN") or ""
        theirs = [environment.get(f"AWS_{name}") or "" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]
        key, secret, token = own if any(own) else (*theirs, token)
        regions = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
        region = client.get("region_name", regions)
        return cls(key, secret, token, region, endpoint.rstrip("/")) if key and secret and region else None

    def url(self, bucket: str, seconds: int) -> str:
        """Of the object ``_NAME`` of a bucket, good for so long."""
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest("GET", f"{self.endpoint}/{bucket}/{_NAME}")
        credentials = Credentials(self.key, self.secret, self.token or None)
        S3SigV4QueryAuth(credentials, "s3", self.region, expires=seconds).add_auth(request)
        return str(request.url)


class Signer:
    """Object key (``bucket/name``) -> URL that may be read. Safe to call from several threads.

    Args:
        sign: makes such a URL, slowly.
        secret: the secret key that it signs with now.
        seconds: for so long a URL is good.
        keys: what it signs with, where that needs no looking up.
    """

    def __init__(
        self, sign: Callable[[str], str], secret: Callable[[], str], seconds: int = 3600, keys: Keys | None = None
    ) -> None:
        self._sign, self._secret, self._seconds, self._keys = sign, secret, seconds, keys
        self._models: dict[str, tuple[float, Model | None]] = {}

    def __call__(self, key: str) -> str:
        bucket, _, name = key.partition("/")
        made, model = self._models.get(bucket, (-MODEL_SECONDS, None))
        if time.monotonic() - made >= MODEL_SECONDS:
            model = self._model(bucket)
            self._models[bucket] = time.monotonic(), model
        return self._sign(key) if model is None else model.url(name)

    def forget(self, key: str) -> None:
        """Ask for the bucket's model again: a URL made after it was refused."""
        self._models.pop(key.partition("/")[0], None)

    def _model(self, bucket: str) -> Model | None:
        keys = self._keys if _BUCKET.fullmatch(bucket) else None
        url = keys.url(bucket, self._seconds) if keys else self._sign(f"{bucket}/{_NAME}")
        try:
            return Model(url, keys.secret if keys else self._secret())
        except ValueError:
            return None
