"""The state of a stream: where it is in the global order, and which order that is. Valid on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from datamodules.format import DataError


class Ordered(Protocol):
    """What a state needs of an order."""

    @property
    def n(self) -> int:
        """Samples of an epoch."""

    def identity(self) -> dict[str, Any]:
        """What decides the order: plain numbers and strings."""


def save(fingerprint: str, order: Ordered, position: int, sampling: str = "") -> dict[str, Any]:
    """State at global ``position``, which runs on over epochs. Plain numbers and strings.

    ``sampling``: what sample ids mean, see ``Windows.identity``.
    """
    epoch, within = divmod(position, order.n)
    return {"epoch": epoch, "position": within, **_identity(fingerprint, order, sampling)}


def restore(state: Mapping[str, Any], fingerprint: str, order: Ordered, sampling: str = "", url: str = "") -> int:
    """Global position of a saved state. ``DataError``, saying what differs (of the data at ``url``), if it belongs to another
    order."""
    where = f"{url}: " if url else ""
    for name, value in _identity(fingerprint, order, sampling).items():
        if name not in state:
            raise DataError(f"{where}the stream state has no {name!r}; it was not saved by this kind of stream")
        if state[name] != value:
            raise DataError(
                f"{where}the stream cannot go on: {name} is {value}, but the saved state has {state[name]}; {_ADVICE[name]}"
            )
    epoch, within = int(state["epoch"]), int(state["position"])
    if epoch < 0 or not 0 <= within < order.n:
        raise DataError(
            f"{where}the stream state is damaged: epoch={epoch}, position={within} with {order.n} samples an epoch"
        )
    return epoch * order.n + within


def _identity(fingerprint: str, order: Ordered, sampling: str) -> dict[str, Any]:
    """What decides the order: the same position means the same sample only if all of these agree."""
    return {"fingerprint": fingerprint, **order.identity(), **({"sampling": sampling} if sampling else {})}


_ADVICE = {
    "fingerprint": "the data set is another one; use the one the run began with, or begin a new run",
    "seed": "resume with the seed that the run began with",
    "samples": "the split, window length or stride changed; use those that the run began with",
    "group": "the shards or samples of a shard changed; use the settings that the run began with",
    "window": "set window_shards to what the run began with",
    "mixture": "the sources, their weights or the unit changed; use those that the run began with",
    "sampling": "the split, window, spacing or pairs changed; use those that the run began with",
}
