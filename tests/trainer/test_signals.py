"""Signals from the first moment of a worker on: real ones, to real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import signals

# A worker that waits in C++, as in a rendezvous to which the others never come: no Python handler runs there.
WAITING = """
import datetime, sys
from trainer import signals
signals.leave_at_once()
import torch.distributed as dist
print("waits", flush=True)
dist.TCPStore("127.0.0.1", 0, 2, True, datetime.timedelta(seconds=300))
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_process_that_waits_for_others_ends_at_once(signum: int, code: int) -> None:
    root = str(Path(__file__).resolve().parents[2])
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    )
    try:
        assert waiting.stdout is not None and waiting.stdout.readline() == "waits\n"
        time.sleep(0.2)  # into the wait
        waiting.send_signal(signum)
        _, told = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert waiting.returncode == code
    assert told == f"keel: warning: {signal.Signals(signum).name} before the first step; nothing was lost\n"


def test_from_the_set_up_on_signals_are_kept_until_they_are_asked_for() -> None:
    before = [signal.getsignal(signum) for signum in signals.SIGNALS]
    signals.note()
    try:
        signals.note()  # the next attempt of the same process: nothing is forgotten
        assert signals.received() == 0
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received() == signal.SIGUSR1
        signals.note()
        assert signals.received() == signal.SIGUSR1
        signal.raise_signal(signal.SIGINT)
        assert signals.received() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signals.release()
    assert signals.received() == 0
    assert [signal.getsignal(signum) for signum in signals.SIGNALS] == before
