"""One rank of `keel doctor`.

    python -m cluster.doctor.worker URL [--accelerator auto] [--mib 16] [--seconds 2]

Exit codes as those of `python -m trainer`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from cluster.doctor import REPORT

_TIMEOUT_S = 120.0  # a rank that does not come to a measurement


def main(argv: list[str] | None = None) -> int:
    """Measures, with all other ranks; rank 0 writes the report."""
    from trainer import restarts
    from trainer.errors import is_user_error, one_line

    parser = argparse.ArgumentParser(prog="python -m cluster.doctor.worker", description=__doc__, allow_abbrev=False)
    parser.add_argument("url", help="where the report goes; its store is what is measured")
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--mib", type=int, default=16, help="size of the object that each node writes and reads")
    parser.add_argument("--seconds", type=float, default=2.0, help="for one collective, about")
    args = parser.parse_args(argv)
    restarts.die_with_parent()
    try:
        examine(args.url, args.accelerator, args.mib, args.seconds)
    except Exception as error:
        if not is_user_error(error):
            raise
        print(one_line(error), file=sys.stderr, flush=True)
        os._exit(2)
    return 0


def examine(url: str, accelerator: str, mib: int, seconds: float) -> dict[str, Any]:
    """The report, on all ranks. Collective."""
    import torch
    import torch.distributed as dist

    from cluster.doctor import measure
    from cluster.doctor.facts import facts
    from datamodules.store import Store
    from trainer.build import accelerator_name
    from trainer.distributed import init_process_group, local_world_size
    from trainer.restarts import NODE

    begun = time.time()
    name = accelerator_name(accelerator)
    mine = facts(name)  # before anything is allocated
    init_process_group(name, _TIMEOUT_S)
    rank, local = dist.get_rank(), local_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")
    store = Store(url)
    mine |= {"rank": rank, "node": int(os.environ.get(NODE) or rank // local)}
    mine["flop_per_s"] = measure.compute(device)
    group = measure.collectives(device, seconds)
    mine["links"] = measure.links(device) if dist.get_world_size() > local else {}
    ahead = measure.clocks()
    mine["store"] = measure.storage(store, mib)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        for other, skew in ahead.items():
            everyone[other]["ahead_s"] = skew
    report = {
        "time": begun,
        "seconds": time.time() - begun,
        "url": url,
        "accelerator": name,
        "processes_per_node": local,
        "group": group,
        "ranks": everyone,
    }
    if rank == 0:
        store.delete_tree("probe")
        store.write_json(REPORT, report)
    dist.barrier()
    return report


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as `python -m trainer`: the tear-down races with gloo's threads
