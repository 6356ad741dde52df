"""How often what failed is started again: so often since the run last made progress."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """Restarts that are left. A commit newer than all before gives back those that were used up: a run of weeks may be hit
    many times, while one that fails again and again in one place ends soon.

    Args:
        allowed: restarts without a new commit in between.
        newest: the step of the newest commit, 0 if there is none; asked after each failure. While it cannot be told (OSError)
            nothing is given back.
    """

    def __init__(self, allowed: int, newest: Callable[[], int]) -> None:
        self.allowed, self._newest = allowed, newest
        self._reached = self._base = 0

    def used(self, count: int) -> int:
        """How many of `count` restarts so far came after the last progress."""
        try:
            newest = self._newest()
        except OSError:
            newest = 0
        if newest > self._reached:
            self._reached, self._base = newest, count
        return count - self._base


def newest_commit(url: str) -> int:
    """The step of the newest commit of the run at `url`; 0 if there is none.

    Raises:
        StoreError: the store cannot be read.
    """
    from datamodules.store import Store
    from trainer.commits import committed_steps

    return max(committed_steps(Store(url).sub("checkpoints")), default=0)
