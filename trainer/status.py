"""What lies below `status/` of a run while it goes, beside what its launcher says there of each node (`node-K.json`)."""

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from datamodules.store import NotFound, Store, StoreError
from trainer.records import strict
from trainer.restarts import HEARTBEAT

RUN = "status/run.json"  # where the run stands, by rank 0
WORKERS = "status/workers-{}.json"  # how the ranks of a node fare, by the first of them
CANCEL = "status/cancel.json"  # by `keel cancel`

log = logging.getLogger("keel.run")


def period() -> float:
    """Seconds between two heartbeats, as the launcher says it."""
    return float(os.environ.get(HEARTBEAT) or 10.0)


def requested(store: Store) -> bool:
    """Whether the run was asked to end, by `keel cancel`, so far as the store tells."""
    try:
        store.read(CANCEL)
    except NotFound:
        return False
    except StoreError as error:
        log.warning("it is not known whether the run was cancelled: %s", error)
        return False
    return True


def ended(store: Store, record: Mapping[str, Any]) -> None:
    """Says how the run ended, in `status/run.json`. By rank 0, once its heartbeat has stopped."""
    known: dict[str, Any] = {"name": record["name"], "heartbeat_s": period()}
    with contextlib.suppress(NotFound):
        known |= store.read_json(RUN)
    said = {"time": time.time(), "phase": None, "status": record["status"], "reason": record["error"]}
    if record["status"] != "failed":
        said |= {"step": record["steps"], "attempt": record["attempts"], "loss": record["loss"]}
    store.write_json(RUN, strict(known | said))
