"""What can go wrong between Keel and a store, one class per thing a user would do about it."""

from __future__ import annotations


class StoreError(OSError):
    """A store operation failed for good. The message is one line: the URL, the cause, what to do."""


class NotFound(StoreError):
    """There is no such object or bucket."""


class NoBucket(NotFound):
    """There is no such bucket, so nothing in it can be found or written."""


class Unreachable(StoreError):
    """The endpoint did not answer within the deadline."""


class AccessDenied(StoreError):
    """Credentials are missing, wrong, or do not allow the operation."""


class OutOfSpace(StoreError):
    """The disk or the quota is full; what was being written has been removed."""


class Changed(StoreError):
    """An object is not the one that was read before: its ETag is another. `path` in the store, and `key` in ETags seen."""

    def __init__(self, message: str, path: str = "", key: str = "") -> None:
        super().__init__(message)
        self.path, self.key = path, key


class ShortRead(StoreError):
    """An object ends before the bytes that were asked for: it is truncated."""
