"""The few things that ranks tell each other outside of training steps."""

import datetime
import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from trainer import restarts

_ERROR_KEY = "keel/error"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def init_process_group(accelerator: str, timeout_seconds: float) -> None:
    """Joins the process group that the launcher's environment names; a lone process needs no address.

    CPU collectives (checkpoint plans, host decisions) go over gloo, also next to NCCL.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    # The last collectives are kept, for the watchdog to put beside the stacks of a hang.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if accelerator == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif restarts.count() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's store outlives the workers, and torch (2.13) tells their successors apart by nothing: they would find
        # the addresses of the dead, and wait for them.
        shared = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"]), False, timeout
        )
        own = dist.PrefixStore(f"keel/start-{restarts.count()}", shared)
        me, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=own, rank=me, world_size=world, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


class LaunchedEnvironment(ClusterEnvironment):
    """Tells Lightning of the process group that is there already, whoever launched it."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        return dist.is_initialized()

    def world_size(self) -> int:
        return world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        return rank() // local_world_size()


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def on_rank_zero(call: Callable[[], Any], group: Any = None) -> Any:
    """Runs `call` on rank 0 and gives all ranks its result, or raises its error on all of them. Collective over `group`,
    which holds all ranks (default: the one that training uses)."""
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = call()
        except Exception as error:
            box[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def post_error(code: int, line: str) -> None:
    """Leaves the cause of this rank's end, and its exit code, where the others look when their collectives break."""
    if world_size() > 1:
        try:
            dist.distributed_c10d._get_default_store().set(_ERROR_KEY, json.dumps([code, line]))
        except RuntimeError:  # the store went with the rank that held it; nobody is left to be told
            return


def posted_error() -> tuple[int, str] | None:
    """(exit code, line) that another rank left with `post_error`, if any did."""
    if world_size() > 1:
        try:
            store = dist.distributed_c10d._get_default_store()
            if store.check([_ERROR_KEY]):
                code, line = json.loads(store.get(_ERROR_KEY))
                return int(code), str(line)
        except RuntimeError:
            return None
    return None
