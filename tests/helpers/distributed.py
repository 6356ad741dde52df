"""Runs a function on several gloo processes, as a test needs it: results back, errors raised, never a hang."""

import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fsspec.config import conf, set_conf_env

# Imported once, in the process from which all others are forked: seconds saved for each. None of them starts a thread.
PRELOAD = ["trainer.run", "fsspec.config"]


def run_distributed(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `function(*args)` on each rank of a gloo group of `world` fresh processes; returns the results by rank.

    `function` must be importable (module level). Raises RuntimeError with the first traceback of a failed rank, or
    TimeoutError; all processes are gone when it returns.
    """
    context: Any = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        workers = [
            context.Process(
                target=_worker,
                args=(rank, world, rendezvous, results, dict(os.environ), function, args),
                daemon=True,
            )
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        values: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(values) < world:
                try:
                    rank, value, error = results.get(timeout=0.2)
                except queue.Empty:
                    dead = [w.exitcode for w in workers if w.exitcode]
                    if dead and results.empty():
                        raise RuntimeError(f"a rank ended with exit code {dead[0]}") from None
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{function.__name__} on {world} ranks took over {timeout} s") from None
                    continue
                if error:
                    raise RuntimeError(f"rank {rank} failed:\n{error}")
                values[rank] = value
            for worker in workers:
                worker.join(10)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                worker.join()
    return [values[rank] for rank in range(world)]


def _worker(
    rank: int,
    world: int,
    rendezvous: str,
    results: Any,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()  # the parent's is that of its own start
    os.environ.update(environment)
    conf.clear()
    set_conf_env(conf)  # which fsspec does when it is imported
    os.environ["OMP_NUM_THREADS"] = "1"  # as a launcher sets it; Lightning would change the number of threads otherwise
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    try:
        dist.init_process_group("gloo", store=dist.FileStore(rendezvous, world), rank=rank, world_size=world)
        value = function(*args)
        dist.barrier()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
