"""Many tiny cells per actor of Ray: each actor runs a driver of its own."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from cluster.launch import EXIT_LOST, EXIT_USER_ERROR
from cluster.sweep import tune_trial
from cluster.sweep.packed import driver_words
from cluster.sweep.sweep import Sweep

_POLL_S = 0.25
_TELL_S = 5.0


def packs(sweep: Sweep, count: int) -> list[int]:
    """Many tiny cells per actor: each is a driver of its own, which claims what it does. Their exit codes."""
    import ray

    remote = ray.remote(tune_trial.Process).options(num_cpus=1)
    actors: list[Any] = [remote.remote(driver_words(sweep), {"OMP_NUM_THREADS": "1"}) for _ in range(count)]
    codes: dict[int, int] = {}
    told, look = False, 0.0
    try:
        while len(codes) < count:
            for i in [i for i in range(count) if i not in codes]:
                try:
                    if sweep.over and not told:
                        actors[i].tell.remote(signal.SIGTERM)
                    code = ray.get(actors[i].poll.remote())
                    if code is not None:
                        codes[i] = code
                    if code == EXIT_USER_ERROR:
                        print(ray.get(actors[i].said.remote()), file=sys.stderr, flush=True)
                except ray.exceptions.RayActorError:  # its node was lost: another pack does what it had
                    codes[i] = EXIT_LOST
            told = sweep.over
            if time.monotonic() > look:
                done, look = len(sweep.results.rows), time.monotonic() + _TELL_S
                if len(sweep.results.refresh()) > done:
                    print(f"{len(sweep.results.rows):,} of {len(sweep.table.rows):,} rows", flush=True)
            time.sleep(_POLL_S)
    finally:
        for actor in actors:
            ray.kill(actor)
    return list(codes.values())
