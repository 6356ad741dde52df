"""Signed URLs of many objects at the price of one: Signature Version 4 in the query of a URL.

botocore takes a millisecond for a URL, most of it to find out the endpoint again, which is a part of what a small range
costs. So it signs one URL per bucket, and those of other objects there are made after that model: they differ in path and
signature. Our signature of its own URL must be the one that it has; where it is not, botocore signs each.

https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit

MODEL_SECONDS = 600.0  # for so long a model is used: credentials may change
_NAME = "keel"  # of the object whose URL is the model; nobody asks for it
_ALGORITHM = "AWS4-HMAC-SHA256"


class Model:
    """The URL that botocore signed for the object ``_NAME``; raises ValueError if others cannot be made after it."""

    def __init__(self, url: str, secret: str) -> None:
        parts = urlsplit(url)
        self._host, self._path = parts.netloc, parts.path.removesuffix(_NAME)
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


class Signer:
    """Object key (``bucket/name``) -> URL that may be read. Safe to call from several threads.

    Args:
        sign: makes such a URL, slowly.
        secret: the secret key that it signs with now.
    """

    def __init__(self, sign: Callable[[str], str], secret: Callable[[], str]) -> None:
        self._sign, self._secret = sign, secret
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
        url = self._sign(f"{bucket}/{_NAME}")
        try:
            return Model(url, self._secret())
        except ValueError:
            return None
