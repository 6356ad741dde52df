"""Object storage and local disk behind one small interface: see `Store`."""

from .direct import Sink
from .errors import AccessDenied, NoBucket, NotFound, OutOfSpace, ShortRead, StoreError, Unreachable
from .retry import Retry
from .store import Store, canonical_json, join_url

__all__ = [
    "AccessDenied",
    "NoBucket",
    "NotFound",
    "OutOfSpace",
    "Retry",
    "ShortRead",
    "Sink",
    "Store",
    "StoreError",
    "Unreachable",
    "canonical_json",
    "join_url",
]
