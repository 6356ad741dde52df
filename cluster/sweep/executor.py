"""What an executor is: it gets rows, and does those that it can claim.

An executor is one file with one class, named in `EXECUTORS` of `cluster.sweep`. It must

- **claim before it starts**: `sweep.claim(rows)` returns the rows that are now this driver's; only those may be run. The
  others are done, or another driver's. Claim as late as possible, when there is room for the row, so that drivers share;
- **run a row in a worker, never in the driver itself** (but for `packed`, whose driver is the worker):
  `sweep.begin(row)` puts the run's config at its URL, whether the row is new or continued, and `sweep.job(row)` is the
  command line of a node that trains it, from its last commit where there is one, started again up to `retries` times from
  its own checkpoint. It ends when its parent does (`PARENT_PID`). Executors that place the workers themselves run
  `python -m trainer fit URL --resume` on each;
- **tell the end**: `sweep.end(row, code)` with the node's exit code, or `sweep.end(row)` where there is none: it reads the
  run's record and adds the result. A diverged run is a result, a pruned one, too; one that failed for good is one with
  status `failed`, which the user may ask to retry. Returns the result, or None where the run was interrupted: then the
  row is given back;
- **stop inside the worker**: whoever decides that a run shall stop early tells its worker, which ends itself at its next
  validation with the status `pruned` (see `trainer.callbacks.pruning`): the rule of the sweep's own `stop` section runs in
  the worker (`sweep.environment(row)` says so); any other decision is a call of `cluster.sweep.stopping.prune(run's
  store, why)`. No executor kills a run to stop it;
- **obey**: as soon as `sweep.over` (a signal, or this driver was given up by another), claim nothing more, send
  SIGTERM to what runs, wait until it has saved, tell each end, and return;
- **refuse what can never fit**: `check(sweep, rows)` raises one clear line that names a row which needs more than there
  is. With rows of several sizes, never hold resources for one row while waiting for another.

`run` returns when no row is left that it could claim. It need not wait for rows of other drivers. It keeps no state: a
driver that is killed at any instant is followed by another, which finds everything in the store.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cluster.sweep import EXECUTORS
from cluster.sweep.table import Row

if TYPE_CHECKING:
    from cluster.sweep.sweep import Sweep


class Executor(Protocol):
    """See the module. Made with `workers`: how many rows (or processes) at once, 0 for what the machine has."""

    def __init__(self, workers: int = 0) -> None: ...

    def check(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        """Raises ValueError where a row can never run here; nothing was claimed yet."""
        ...

    def run(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        """Does those of `rows` that it can claim, in their order as far as there is room."""
        ...


def open_executor(name: str, workers: int = 0) -> Executor:
    """The executor of that name.

    Raises:
        ValueError: unknown, or impossible `workers`.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor={name}: unknown; one of {', '.join(EXECUTORS)}")
    if workers < 0:
        raise ValueError(f"workers={workers}: must be at least 0")
    module, _, attribute = EXECUTORS[name].partition(":")
    kind: Any = getattr(importlib.import_module(module), attribute)
    made: Executor = kind(workers)
    return made
