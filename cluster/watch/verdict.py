"""From what a run has said, how it fares: above all whether it is dead or only slow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.launch import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE
from cluster.launch.node_watch import ENDED, RESTARTING, STARTING, WAITING
from cluster.watch.seen import Said, Seen
from cluster.watch.units import duration

# It goes on, or will.
GOING = ("queued", "waiting", "starting", "restarting", "running")
# It has ended with a result.
DONE = ("done", "diverged", "pruned")
# It has ended, or goes on, in a way that somebody should look at.
TROUBLE = ("stalled", "dead", "failed", "preempted", "cancelled", "interrupted", "unknown")

_STEP = ("data wait", "forward", "backward", "optimiser", "end of step")
_QUIET_S = 60.0  # no step for so long, and for so many times what one takes, is a stall
_QUIET_STEPS = 20


@dataclass(frozen=True)
class Verdict:
    """`state`: one of the names above; `why`: what there is to add, in one line ("" for nothing)."""

    state: str
    why: str = ""

    @property
    def exit_code(self) -> int:
        return 0 if self.state in GOING + DONE else 1

    @property
    def over(self) -> bool:
        """Whether nothing more is to come, unless somebody starts it again."""
        return self.state not in (*GOING, "stalled", "unknown")


def judge(seen: Seen, job: str | None = None) -> Verdict:
    """How the run fares.

    Args:
        job: the state of its job as the backend tells it (see `cluster.launch.base.STATES`); None: nobody could be asked.
    """
    if seen.silent and seen.job is not None:
        return _unheard(seen, job)
    verdict = _by_store(seen)
    if job == "queued" and verdict.state in ("dead", "preempted", "failed"):
        return Verdict("queued", f"again; before, it was {verdict.state}")
    if job == "cancelled" and verdict.state in ("preempted", "interrupted"):
        return Verdict("cancelled", verdict.why)
    if job == "running":
        if verdict.state == "dead":
            return Verdict("stalled", f"{verdict.why}, although its job runs")
        if verdict.state == "preempted":  # its job is about to start it again, or to end
            return Verdict("restarting", verdict.why)
    if job in ("done", "failed", "cancelled") and verdict.state == "dead":
        return Verdict("cancelled" if job == "cancelled" else "failed", f"its job ended ({job}); {verdict.why}")
    return verdict


def _unheard(seen: Seen, job: str | None) -> Verdict:
    """It was submitted, and nobody has said a word since; a record may be that of an earlier job."""
    if job == "running":
        return Verdict("starting", "its job runs, and has not said a word yet")
    if job != "queued" and seen.record is not None and not seen.earlier:
        return _ended(seen.record["status"], seen.record.get("error"))
    if job in ("done", "failed", "cancelled"):
        return Verdict("cancelled" if job == "cancelled" else "failed", f"its job ended ({job}) before it began")
    return Verdict("queued", "it was asked to end" if seen.cancelled else "")


def _by_store(seen: Seen) -> Verdict:
    run, nodes = seen.run, seen.nodes
    if seen.silent:
        if seen.record is not None:
            return _ended(seen.record["status"], seen.record.get("error"))
        return Verdict("unknown", "it has never said how it fares")
    alive = {number: said for number, said in nodes.items() if _phase(said) != ENDED and not said.late}
    silent = {number: said for number, said in nodes.items() if _phase(said) != ENDED and said.late}
    if alive:
        return _alive(seen, alive, silent)
    if run is not None and run.content.get("status"):
        return _ended(run.content["status"], run.content.get("reason"))
    if nodes and not silent:
        return _nodes_ended(seen)
    if run is not None and not run.late:
        return _running(run)
    heard = [said for said in (run, *silent.values()) if said is not None]
    return Verdict("dead", _silence(min(heard, key=lambda said: said.age)))


def _alive(seen: Seen, alive: Mapping[int, Said], silent: Mapping[int, Said]) -> Verdict:
    """At least one launcher lives."""
    first = alive[min(alive)]
    run, phase, attempt = seen.run, _phase(first), int(first.content.get("attempt") or 0)
    # A node that was lost in an earlier attempt is missed by nobody.
    silent = {n: said for n, said in silent.items() if int(said.content.get("attempt") or attempt) >= attempt}
    if phase == WAITING:
        return Verdict("waiting", f"for the other nodes; {_count(len(alive), 'node')} so far")
    if phase == RESTARTING:
        return Verdict("restarting", str(first.content.get("cause") or ""))
    if phase == STARTING or run is None or int(run.content.get("attempt") or 0) < attempt:
        cause = first.content.get("cause")
        return Verdict("starting", f"again: {cause}" if cause else "")
    if run.content.get("status"):
        return _ended(run.content["status"], run.content.get("reason"))
    if silent:
        names = ", ".join(f"node {number} ({said.content.get('host')})" for number, said in sorted(silent.items()))
        return Verdict("stalled", f"{names}: {_silence(min(silent.values(), key=lambda said: said.age))}")
    if run.late:
        return Verdict("stalled", f"rank 0 on {run.content.get('host')} is silent: {_silence(run)}; its launcher lives")
    return _running(run)


def _running(run: Said) -> Verdict:
    """Rank 0 is heard: it moves, or stands."""
    phase, rate = run.content.get("phase"), run.content.get("steps_per_s")
    if phase == "start-up":
        return Verdict("starting", "building the network and opening the data")
    if not rate:  # nothing says how long a step takes
        return Verdict("running", "in its first steps")
    quiet = float(run.content["time"]) - float(run.content["step_time"]) + run.age
    if phase in _STEP and quiet > max(_QUIET_S, _QUIET_STEPS / rate):
        return Verdict("stalled", f"no step for {duration(quiet)}, where one takes {duration(1 / rate)}: in {phase}")
    return Verdict("running")


def _nodes_ended(seen: Seen) -> Verdict:
    """All launchers have ended, and the workers did not say how: they were killed, or never began."""
    ends = [said.content for _, said in sorted(seen.nodes.items())]
    bad: Mapping[str, Any] = next((end for end in ends if end.get("exit_code") != EXIT_OK), ends[0])
    code, reason = bad.get("exit_code"), str(bad.get("reason") or "")
    if code == EXIT_OK:
        return Verdict("done")
    if code == EXIT_REQUEUE:  # also where it was told to end before anything was there to be saved
        return Verdict("cancelled" if seen.cancelled else "preempted", reason)
    if code == EXIT_INTERRUPTED:
        return Verdict("cancelled" if seen.cancelled else "interrupted", reason)
    return Verdict("failed", reason)


def _ended(status: str, reason: Any) -> Verdict:
    return Verdict("done" if status == "ok" else status, str(reason or ""))


def _silence(said: Said) -> str:
    return f"no heartbeat for {duration(said.age)}, where one is due every {duration(said.period)}"


def _phase(said: Said) -> str:
    return str(said.content.get("phase"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
