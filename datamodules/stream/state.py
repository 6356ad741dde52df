"""The state of a stream: where it is in the global order, and which order that is. Valid on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.format import DataError

from .order import Order


def save(fingerprint: str, order: Order, position: int) -> dict[str, Any]:
    """State at global ``position``, which runs on over epochs. Plain numbers and strings."""
    epoch, within = divmod(position, order.n)
    return {"epoch": epoch, "position": within, **_identity(fingerprint, order)}


def restore(state: Mapping[str, Any], fingerprint: str, order: Order) -> int:
    """Global position of a saved state. ``DataError``, saying what differs, if it belongs to another order."""
    for name, value in _identity(fingerprint, order).items():
        if name not in state:
            raise DataError(f"the stream state has no {name!r}; it was not saved by this kind of stream")
        if state[name] != value:
            raise DataError(
                f"the stream cannot go on: {name} is {value}, but the saved state has {state[name]}; {_ADVICE[name]}"
            )
    epoch, within = int(state["epoch"]), int(state["position"])
    if epoch < 0 or not 0 <= within < order.n:
        raise DataError(
            f"the stream state is damaged: epoch={epoch}, position={within} with {order.n} samples an epoch"
        )
    return epoch * order.n + within


def _identity(fingerprint: str, order: Order) -> dict[str, Any]:
    """What decides the order: the same position means the same sample only if all of these agree."""
    return {
        "fingerprint": fingerprint,
        "seed": order.seed,
        "samples": order.n,
        "group": order.group,
        "window": order.window,
    }


_ADVICE = {
    "fingerprint": "the data set is another one; use the one the run began with, or begin a new run",
    "seed": "resume with the seed that the run began with",
    "samples": "the split, window length or stride changed; use those that the run began with",
    "group": "the shards or samples of a shard changed; use the settings that the run began with",
    "window": "set window_shards to what the run began with",
}
