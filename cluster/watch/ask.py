"""A run's store and, where it can be reached from here, the backend of its job: together they say how it fares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.launch.job import JobFile, read_job
from cluster.watch.seen import Seen, look
from cluster.watch.verdict import DONE, Verdict, judge
from datamodules.store import Store

_BACKEND_S = 30.0  # a backend that does not answer for so long is not reachable from here


def ask(store: Store) -> tuple[Seen, Verdict, Mapping[str, Any] | None]:
    """What is seen of a run, what it means, and its job."""
    seen = look(store)
    verdict = judge(seen)
    if seen.job is None:
        return seen, verdict, None
    index = seen.job.get("index")
    name = seen.job["job_id"] if index is None else f"{seen.job['job_id']}_{index}"
    said: dict[str, Any] = {"id": name, "backend": seen.job["backend"], "state": None}
    if verdict.state not in DONE or seen.silent:
        said["state"], said["error"] = _job_state(store)
        verdict = judge(seen, said["state"])
    return seen, verdict, said


def _job_state(store: Store) -> tuple[str | None, str | None]:
    """(state of the run's job by its backend, or None; why it could not be asked)."""
    state, error = tell(store, JobFile.state)
    if state == "unknown":
        return None, "its backend, as it is seen from here, does not know it"
    return state, error


def tell(store: Store, call: Callable[[JobFile], Any]) -> tuple[Any, str | None]:
    """`call` of the run's job, and what went wrong with it: this machine may have no way to the backend at all."""
    found: list[Any] = []
    failed: list[str] = []

    def work() -> None:
        try:
            job = read_job(store)
            found.append(None if job is None else call(job))
        except Exception as error:  # whatever its client may raise, the store goes on telling
            failed.append(" ".join(str(error).split()) or type(error).__name__)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_BACKEND_S)
    if found:
        return found[0], None
    return None, failed[0] if failed else f"it does not answer within {_BACKEND_S:g} s"


def wait(store: Store) -> tuple[Seen, Verdict, Mapping[str, Any] | None]:
    """`ask`, once the run has ended or is dead, and its job has left the queue."""
    while True:
        found = ask(store)
        if over(found[1], found[2]):
            return found
        time.sleep(pause(found[0]))


def over(verdict: Verdict, job: Mapping[str, Any] | None) -> bool:
    """Whether nothing more is to come: neither of the run, nor of its job, which may end later, or start it again."""
    return verdict.over and (job is None or job["state"] not in ("queued", "running"))


def watched(store: Store, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """Whether nothing more is to come of the run, for those who ask often: looked at once per heartbeat."""
    due = 0.0

    def is_over() -> bool:
        nonlocal due
        if clock() < due:
            return False
        seen, verdict, job = ask(store)
        due = clock() + pause(seen)
        return over(verdict, job)

    return is_over


def pause(seen: Seen) -> float:
    """Seconds after which the run may have something new to say: between two of its heartbeats."""
    heard = seen.run or next(iter(seen.nodes.values()), None)
    return min(max(heard.period if heard else 2.0, 0.5), 30.0)
