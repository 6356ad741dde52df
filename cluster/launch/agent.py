"""torch elastic's agent as Keel runs it: it starts a failed group again only when that can help, and its nodes agree on
what they start."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from cluster.launch import EXIT_HANG, EXIT_REQUEUE

# rank -> (exit code, time noticed)
Failures = dict[int, tuple[int, float]]

# How long the ranks beside a failed one may take to say what they lost: they cannot save without it. After a hang they
# have said it already.
_STOP_S, _STOP_HUNG_S = 10, 2
_READ_S = 10  # how long a node that ends the job waits for the others to see why


class Agent(LocalElasticAgent):
    """Asks `again(failures)` whether to start a failed group again; it returns when it is time to.

    `changed()` is called when the group is started again because a node came or went, and `starting(notes, group)` before
    each start, with what `note()` returned on each of the nodes, in their order.
    """

    def __init__(
        self,
        *args: Any,
        again: Callable[[Failures], bool],
        changed: Callable[[], None],
        note: Callable[[], Mapping[str, Any]],
        starting: Callable[[list[dict[str, Any]], WorkerGroup], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._again, self._changed, self._note, self._starting = again, changed, note, starting
        self._failed = False
        self.last: Failures = {}

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
        if result.state == WorkerState.FAILED:
            self.last = failures(result)
            self._failed = self._again(self.last)
            if not self._failed:
                self._remaining_restarts = 0
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if not self._failed:
            self._changed()
        self._failed = False
        super()._restart_workers(worker_group)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        handler: Any = worker_group.spec.rdzv_handler
        # torch (2.13) keeps the address of the workers' store from round to round, also when its node was replaced.
        handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        try:
            super()._rendezvous(worker_group)
        except (RuntimeError, ValueError) as error:  # of the store, unlike what the rendezvous itself raises
            raise RendezvousConnectionError("the connection was lost while the group formed") from error
        store: Any = worker_group.store
        world, mine = worker_group.group_world_size or 1, json.dumps(dict(self._note()))
        try:
            store.set(f"keel/note/{worker_group.group_rank}", mine)
            notes = [json.loads(store.get(f"keel/note/{rank}")) for rank in range(world)]
            store.set(f"keel/read/{worker_group.group_rank}", "")
        except RuntimeError as error:
            raise RendezvousConnectionError("the connection was lost while the group formed") from error
        try:
            self._starting(notes, worker_group)
        except ValueError:
            # The store goes with this process: the others are to read what is wrong, too.
            with suppress(RuntimeError):
                store.wait([f"keel/read/{rank}" for rank in range(world)], timedelta(seconds=_READ_S))
            raise


def failures(result: RunResult) -> Failures:
    """The failed ranks of a group."""
    return {rank: (failure.exitcode, failure.timestamp) for rank, failure in result.failures.items()}


def local_address(endpoint: str) -> str:
    """The address of this machine from which HOST:PORT is reached (no packet is sent).

    Raises:
        OSError: the host's name is unknown, or there is no route to it.
    """
    host, _, port = endpoint.rpartition(":")
    family, _, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address; "" if none is found."""
    import fcntl

    if ":" in address:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, name.encode().ljust(256, b"\0"))  # SIOCGIFADDR
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return "lo" if address.startswith("127.") else ""
