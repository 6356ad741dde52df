"""torch elastic's agent as Keel runs it: it starts a failed group again only when that can help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from cluster.launch import EXIT_HANG, EXIT_REQUEUE

# rank -> (exit code, time noticed)
Failures = dict[int, tuple[int, float]]

# How long the ranks beside a failed one may take to say what they lost: they cannot save without it. After a hang they
# have said it already.
_STOP_S, _STOP_HUNG_S = 10, 2


class Agent(LocalElasticAgent):
    """Asks `again(failures)` whether to start a failed group again; it returns when it is time to."""

    def __init__(self, *args: Any, again: Callable[[Failures], bool], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._again = again

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started = super()._start_workers(worker_group)
        context: Any = self._pcontext
        close = context._close

        def short(death_sig: Any, timeout: int = 30) -> None:
            codes = [handler.proc.poll() for handler in context.subprocess_handlers.values()]
            longest = _STOP_HUNG_S if EXIT_HANG in codes else _STOP_S
            close(death_sig, timeout if EXIT_REQUEUE in codes else min(timeout, longest))

        context._close = short
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and not self._again(failures(result)):
            self._remaining_restarts = 0
        return result


def failures(result: RunResult) -> Failures:
    """The failed ranks of a group."""
    return {rank: (failure.exitcode, failure.timestamp) for rank, failure in result.failures.items()}
