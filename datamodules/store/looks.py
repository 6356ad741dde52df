"""What a remote filesystem says of the objects below a prefix, and when they were written."""

from __future__ import annotations

from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from typing import Any

from .retry import is_transient


def objects(filesystem: Any, key: str) -> list[str]:
    """All objects below the folder `key`, sorted, relative to it."""
    try:
        return _below(filesystem.find(key), key)
    except FileNotFoundError:
        return []


def _below(names: Iterable[str], key: str) -> list[str]:
    lead = key.strip("/") + "/" if key.strip("/") else ""
    found = (name.strip("/") for name in names)
    return sorted(name[len(lead) :] for name in found if name.startswith(lead) and name != lead)


def children(filesystem: Any, key: str) -> tuple[list[str], list[str]]:
    """(folders, objects) directly below the folder `key`: their last names, sorted."""
    try:
        found = filesystem.ls(key, detail=True)
    except FileNotFoundError:
        return [], []
    folders, files = (
        _below([entry["name"] for entry in found if entry["type"] == kind], key) for kind in ("directory", "file")
    )
    return folders, files


def times(filesystem: Any, key: str) -> tuple[float, float] | None:
    """When the S3 object `key` was written and what time it is there, in whole seconds since the epoch."""
    bucket, _, name = key.partition("/")
    answer = filesystem.call_s3("head_object", Bucket=bucket, Key=name)
    date = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    return None if date is None else (answer["LastModified"].timestamp(), parsedate_to_datetime(date).timestamp())


def refused(filesystem: Any, key: str) -> None:
    """Raises why S3 refused a HEAD of `key`, whose answer has no body that says it, if that is for a while only."""
    bucket, _, name = key.partition("/")
    try:
        filesystem.call_s3("get_object", Bucket=bucket, Key=name or "-", Range="bytes=0-0")
    except Exception as error:
        if is_transient(error):
            raise
