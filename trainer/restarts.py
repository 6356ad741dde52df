"""What a worker learns from the launcher that has started it again."""

import os

COUNT = "KEEL_RESTARTS"
CAUSE = "KEEL_RESTART_CAUSE"

EXIT_HANG = 76  # the watchdog ended the process


def count() -> int:
    """How often the processes of this job have been started again; 0 on the first start."""
    return int(os.environ.get(COUNT) or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def cause() -> str | None:
    """Why, in a few words; None on the first start, or when the launcher is not Keel's."""
    return os.environ.get(CAUSE) or None
