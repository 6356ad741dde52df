"""What a worker learns from the launcher that has started it again."""

import ctypes
import math
import os
import signal
import sys

COUNT = "KEEL_RESTARTS"
CAUSE = "KEEL_RESTART_CAUSE"

PARENT_PID = "KEEL_PARENT_PID"
NODE, HEARTBEAT = "KEEL_NODE", "KEEL_HEARTBEAT_S"  # number of this node; seconds between two heartbeats

EXIT_HANG = 76  # the watchdog ended the process
EXIT_UNAVAILABLE = 69  # the store did not answer in time, or throttled: a later start may succeed
_PR_SET_PDEATHSIG = 1


def count() -> int:
    """How often the processes of this job have been started again; 0 on the first start."""
    return int(os.environ.get(COUNT) or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def cause() -> str | None:
    """Why, in a few words; None on the first start, or when the launcher is not Keel's."""
    return os.environ.get(CAUSE) or None


def die_with_parent() -> None:
    """Asks Linux to kill this process when its launcher is killed, so that none is left over."""
    parent = os.environ.get(PARENT_PID)
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(1)


def be_patient() -> None:
    """After a restart: an endpoint that this new process has not reached yet was right before, and gets the full deadline
    of the store, not the short one for addresses that never answered. What the user has set holds."""
    if not count():
        return
    from fsspec.config import conf

    conf.setdefault("keel", {}).setdefault("connect_deadline", math.inf)
