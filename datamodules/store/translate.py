"""Errors of the libraries below, in words of one's own."""

from __future__ import annotations

import errno

from .errors import AccessDenied, NotFound, OutOfSpace, StoreError, Unreachable
from .retry import SKEWED, chain, is_transient, response_of

# A disk or a quota that is full. Servers answer with 507, or with 403 and one of these codes (Ceph, MinIO).
_FULL_ERRNO = (errno.ENOSPC, errno.EDQUOT)
_FULL_CODES = ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded")


def translate(error: Exception, url: str, is_local: bool) -> StoreError:
    """What the libraries below raised about the object `url`, as one clear line."""
    names = {type(link).__name__ for link in chain(error)}
    status, code = response_of(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if names & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"}:
        return AccessDenied(
            f"{url}: no credentials ({text}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if status == 507 or code in _FULL_CODES or (isinstance(error, OSError) and error.errno in _FULL_ERRNO):
        reason = code or getattr(error, "strerror", None) or text
        return OutOfSpace(f"{url}: no space left for it ({reason}); free space and start again")
    if isinstance(error, NotADirectoryError):
        return StoreError(f"{url}: goes through a file, where a folder was expected; choose another path")
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{url}: not found; check the URL")
    if code == SKEWED:
        return Unreachable(f"{url}: the store refuses this machine's clock ({text}); set it right")
    if isinstance(error, PermissionError) or status in (401, 403):
        hint = "check its permissions" if is_local else "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE"
        return AccessDenied(f"{url}: access denied ({code or text}); {hint}")
    if is_transient(error):
        endpoint = "" if is_local else "; check AWS_ENDPOINT_URL and the network"
        return Unreachable(f"{url}: the store did not answer in time ({type(error).__name__}: {text}){endpoint}")
    return StoreError(f"{url}: {type(error).__name__}: {text}")
