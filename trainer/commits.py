"""Which steps of a run are committed: the names, for those who read no checkpoint (light to import)."""

import re
from concurrent.futures import ThreadPoolExecutor

from datamodules.store import Store

MARKER = "COMMITTED"
_STEP = re.compile(r"^step-\d{8,}$")
_THREADS = 16


def step_name(step: int) -> str:
    """Folder of a step, such as `step-00000100`; sorts by step."""
    return f"step-{step:08d}"


def committed_steps(store: Store) -> list[int]:
    """Steps with a marker, ascending, under the `checkpoints/` store of a run. Existence only; see `trainer.checkpoint`."""
    found = [folder for folder in store.children()[0] if _STEP.match(folder)]
    # Asked for one by one: a listing of all would name every shard of every rank.
    with ThreadPoolExecutor(_THREADS) as pool:
        whole = pool.map(lambda folder: store.exists(f"{folder}/{MARKER}"), found)
        return sorted(int(folder[len("step-") :]) for folder, there in zip(found, whole, strict=True) if there)
