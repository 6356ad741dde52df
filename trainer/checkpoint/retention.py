"""Which committed checkpoints are kept."""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.store import NotFound, Store
from trainer.checkpoint import manifest as manifests

log = logging.getLogger("keel.checkpoint")


@dataclass(frozen=True)
class Entry:
    """A committed step: when it was committed (seconds since the epoch; 0: unknown), and its validation metrics."""

    step: int
    created: float = 0.0
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class Retention:
    """What is kept is kept by at least one of these rules.

    Args:
        keep_last: the newest of the whole ones (2 or more, so that a bad one can be fallen back from).
        keep_every: steps divisible by it, for good (0: none).
        keep_minutes: one per so many minutes of wall time, for good (0: none).
        keep_best: so many with the best value of the metric `best`.
        best: name of a validation metric, such as `val/loss`.
        best_mode: `min` or `max`.
    """

    keep_last: int = 2
    keep_every: int = 0
    keep_minutes: float = 0.0
    keep_best: int = 1
    best: str = ""
    best_mode: str = "min"

    def __post_init__(self) -> None:
        if self.keep_last < 2:
            raise ValueError(
                f"keep_last={self.keep_last}: at least 2 are kept, so that a bad one can be fallen back from"
            )
        for name, least in (("keep_every", 0), ("keep_minutes", 0), ("keep_best", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")

    def kept(self, entries: Sequence[Entry], whole: Callable[[int], bool] = lambda step: True) -> dict[int, str]:
        """Step -> the rule that keeps it, of committed steps in ascending order.

        Args:
            entries: committed steps, ascending.
            whole: whether the files of a step are there; asked of the newest only. Damaged ones do not count as kept.
        """
        kept: dict[int, str] = {}
        count = 0
        for entry in reversed(entries):
            if count >= self.keep_last:
                break
            count += bool(whole(entry.step))
            kept[entry.step] = "last"
        for entry in self._best(entries):
            kept.setdefault(entry.step, "best")
        last_time: float | None = None
        for entry in entries:
            if self.keep_every and entry.step % self.keep_every == 0:
                kept.setdefault(entry.step, "every")
            if self.keep_minutes and (last_time is None or abs(entry.created - last_time) >= 60 * self.keep_minutes):
                kept.setdefault(entry.step, "minutes")  # also after a clock that jumped back
                last_time = entry.created
        return kept

    def _best(self, entries: Sequence[Entry]) -> list[Entry]:
        if not self.best:
            return []
        sign = 1.0 if self.best_mode == "min" else -1.0
        known = [entry for entry in entries if entry.metrics and entry.metrics.get(self.best) is not None]
        known = [entry for entry in known if entry.metrics and entry.metrics[self.best] == entry.metrics[self.best]]
        return sorted(known, key=lambda entry: (sign * (entry.metrics or {})[self.best], entry.step))[: self.keep_best]


class Ledger:
    """What is known of the committed steps of a store; each is read once. One process (rank 0), any of its threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._created: dict[int, float] = {}
        self._metrics: dict[int, dict[str, float] | None] = {}
        self._lock = threading.Lock()  # metrics are noted beside a save in the background

    def note(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps the validation metrics of a step beside its checkpoint."""
        with self._lock:
            self.store.write_json(
                _metrics_path(step), {name: value for name, value in metrics.items() if value == value}
            )
            self._metrics[step] = metrics

    def noted(self, step: int) -> dict[str, float] | None:
        """What was noted of a step, so far as this process knows."""
        return self._metrics.get(step)

    def entries(self, *, metrics: bool = True) -> list[Entry]:
        """All committed steps, ascending. A damaged marker counts as one of unknown age."""
        found = []
        for step in manifests.committed_steps(self.store):
            if step not in self._created:
                self._created[step] = self._time(step)
            if metrics and step not in self._metrics:
                values = self._values(step)
                with self._lock:
                    self._metrics.setdefault(step, values)  # what was noted meanwhile is newer
            found.append(Entry(step, self._created[step], self._metrics.get(step)))
        return found

    def forget(self, step: int, noted: dict[str, float] | None) -> None:
        """A step is about to be written anew: what had been `noted` of it by then holds no longer. What has been noted
        since is of the new one, whose validation may be over before its upload begins."""
        self._created.pop(step, None)
        with self._lock:
            if noted is not None and self._metrics.get(step) is noted:
                del self._metrics[step]
                self.store.delete(_metrics_path(step))

    def remove(self, step: int) -> None:
        """Removes a checkpoint, marker first, so that a half-removed one is never trusted; and its metrics before that, which
        would else be those of a step that is written anew."""
        with self._lock:
            self.store.delete(_metrics_path(step))
            self._metrics.pop(step, None)
        self._created.pop(step, None)
        folder = self.store.sub(manifests.step_name(step))
        folder.delete(manifests.MARKER)
        folder.delete_tree("")

    def _time(self, step: int) -> float:
        try:
            marker = json.loads(self.store.read(f"{manifests.step_name(step)}/{manifests.MARKER}"))
            return float(marker.get("created", 0.0))
        except (NotFound, ValueError, AttributeError, TypeError):
            return 0.0

    def _values(self, step: int) -> dict[str, float] | None:
        try:
            found: Any = json.loads(self.store.read(_metrics_path(step)))
            return {str(name): float(value) for name, value in found.items()}
        except (NotFound, ValueError, AttributeError, TypeError):
            return None


def _metrics_path(step: int) -> str:
    return f"metrics/{manifests.step_name(step)}.json"
