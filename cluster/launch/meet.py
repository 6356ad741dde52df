"""How the nodes of a job meet: torch elastic's c10d rendezvous, whose store lives in the process of node 0."""

from __future__ import annotations

import contextlib
import math
import socket
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from cluster.launch.agent import local_address

if TYPE_CHECKING:
    from cluster.launch import Group, Job

CHANGED = "a node left or joined"
_READ_S = 20  # one request to the store of node 0; a cut link is noticed after this
_BIND_S = 10  # a port of a process that has just ended is soon free


class Closed(Exception):
    """The job is over on the other nodes."""


class Lost(Exception):
    """The nodes did not meet, or lost each other for good. The message is one line."""


class _Restarts(Protocol):
    count: int
    cause: str

    def counted(self, cause: str, count: int | None = None) -> None: ...


def rendezvous(group: Group | None) -> tuple[RendezvousHandler, str]:
    """Reaches node 0 (or listens, on node 0) and returns the handler and the address that this node has for the others.

    Raises:
        Lost: node 0 was not there within the time; on node 0, its port is taken.
    """
    if group is None:
        alone = RendezvousParameters(
            "c10d", "localhost:0", uuid.uuid4().hex, min_nodes=1, max_nodes=1, local_addr="127.0.0.1"
        )
        return get_rendezvous_handler(alone), "127.0.0.1"
    interval = max(1, round(group.lost_s / 3))
    named_by = time.monotonic() + group.join_timeout_s
    deadline = named_by if group.node else time.monotonic() + _BIND_S
    while True:
        try:
            address = local_address(group.endpoint)
            if group.node:
                _knock(group.endpoint)
            settings = RendezvousParameters(
                "c10d",
                group.endpoint,
                "keel",
                min_nodes=group.nodes,
                max_nodes=max(group.nodes, group.max_nodes),
                local_addr=address,
                is_host=group.node == 0,
                read_timeout=_READ_S,
                join_timeout=round(group.join_timeout_s),
                last_call_timeout=min(30, math.ceil(group.join_timeout_s / 4)),  # well before the other is over
                keep_alive_interval=interval,
                keep_alive_max_attempt=3,
            )
            return get_rendezvous_handler(settings), address
        except (RendezvousConnectionError, OSError) as error:
            nameless = isinstance(error, socket.gaierror)
            if nameless and time.monotonic() < named_by:  # a pod runs before its name is known, also to itself
                deadline = max(deadline, time.monotonic() + _BIND_S)
            if time.monotonic() > deadline:
                if group.node == 0 and nameless:
                    raise Lost(f"node 0 does not find its own name, {group.endpoint} ({_reason(error)})") from error
                if group.node == 0:
                    raise Lost(
                        f"node 0 cannot listen on {group.endpoint}: the port is taken; set another one"
                    ) from error
                raise Lost(
                    f"node {group.node} did not reach node 0 at {group.endpoint} within {group.join_timeout_s:g} s "
                    f"({_reason(error)}); check that node 0 runs and that the network lets this port through"
                ) from error
            time.sleep(0.5)


def _knock(endpoint: str) -> None:
    # torch's own attempt blocks, deaf to signals, for its whole time-out.
    host, _, port = endpoint.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (" ".join(str(cause).split()) or type(cause).__name__)[:160]


def leave(handler: Any) -> None:
    """Gives a handler up whose connection is lost. To shut it down would end the job on all nodes."""
    handler._stop_heartbeats()


@contextlib.contextmanager
def errors(group: Group | None) -> Iterator[None]:
    """Turns what torch raises while nodes meet into `Closed` and `Lost`; a lost connection stays one."""
    try:
        yield
    except RendezvousClosedError as error:
        raise Closed from error
    except RendezvousTimeoutError as error:
        assert group is not None
        raise Lost(
            f"the {group.nodes} nodes of the job did not all come within {group.join_timeout_s:g} s (this is node "
            f"{group.node}); `keel status` names those that live"
        ) from error


def note(job: Job) -> dict[str, Any]:
    """What this node tells the others before each start."""
    if job.observer is None:
        return {"attempt": 1, "node": 0, "host": "", "facts": {}}
    return {
        "attempt": job.observer.attempt(),
        "node": job.group.node if job.group else 0,
        "host": socket.gethostname(),
        "facts": job.observer.facts(),
    }


def agree(restarts: _Restarts, notes: list[dict[str, Any]]) -> int:
    """Takes over how often the group was started again; returns the attempt that all nodes start.

    Raises:
        ValueError: the nodes do not run the same versions.
    """
    first = notes[0]
    for other in notes[1:]:
        for name in sorted(first["facts"].keys() | other["facts"].keys()):
            if (a := first["facts"].get(name)) != (b := other["facts"].get(name)):
                raise ValueError(
                    f"node {other['node']} ({other['host']}) has {name} {b}, node {first['node']} ({first['host']}) has "
                    f"{a}: all nodes must run the same"
                )
    count = max(n["count"] for n in notes)
    causes = sorted((n["cause"] for n in notes if n["count"] == count), key=_consequence)
    if count > restarts.count or causes[0] != restarts.cause:
        restarts.counted(causes[0], count)
    return max(n["attempt"] for n in notes)


def _consequence(cause: str) -> int:
    """Which of two causes is that of the other: a rank that was killed makes its peers fail, and they the group change."""
    return 2 if cause == CHANGED else 1 if "failed with exit code" in cause else 0
