"""Object storage and local disk behind one small interface: see `Store`."""

from .direct import Tags
from .errors import AccessDenied, Changed, NoBucket, NotFound, OutOfSpace, ShortRead, StoreError, Unreachable
from .names import canonical_json, join_url
from .retry import Retry
from .store import Store
from .wire import Sink

__all__ = [
    "AccessDenied",
    "Changed",
    "NoBucket",
    "NotFound",
    "OutOfSpace",
    "Retry",
    "ShortRead",
    "Sink",
    "Store",
    "StoreError",
    "Tags",
    "Unreachable",
    "canonical_json",
    "join_url",
]
