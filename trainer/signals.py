"""Signals that end a run, from the first moment of a worker to its last: none is lost, none ends it half saved.

SIGTERM and SIGUSR1 ask for a save and the requeue code, SIGINT for a save. At first nothing is there to be saved: a
process in its imports or in the rendezvous, which may wait inside C++ where no Python handler runs, ends at once with
the same code (`leave_at_once`). From the set-up of training on a signal is kept (`note`), also while a run goes back to an
earlier commit, until training has seen it at a step boundary; see `trainer.callbacks.preemption`.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130

_received = 0
_before: dict[signal.Signals, Any] = {}
_leaving = False


def leave_at_once() -> None:
    """Until `note`, a signal ends this process with `EXIT_PREEMPTED` (SIGINT: `EXIT_INTERRUPTED`)."""
    global _leaving
    if _leaving or threading.current_thread() is not threading.main_thread():
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _leaving = True
    threading.Thread(target=_leave, args=(reading,), name="keel-signals", daemon=True).start()
    for signum in SIGNALS:  # last: a signal between the two kinds of taking note would be lost
        signal.signal(signum, _nothing)


def note() -> None:
    """From here on, until `release`, signals are kept for `received`. A second SIGINT interrupts. May be called again."""
    global _leaving
    if _before or threading.current_thread() is not threading.main_thread():
        return
    for signum in SIGNALS:
        _before[signum] = signal.signal(signum, _note)
    if _leaving:
        _leaving = False
        signal.set_wakeup_fd(-1)


def received() -> int:
    """The signal that this process was sent since `note`; 0: none."""
    return _received


def ask() -> None:
    """As if this process had received SIGTERM since `note`; from any thread."""
    global _received
    _received = _received or signal.SIGTERM


def release() -> None:
    """The handlers from before `note`, and no signal received."""
    global _received
    for signum, handler in _before.items():
        signal.signal(signum, handler)
    _before.clear()
    _received = 0


def _note(signum: int, frame: FrameType | None) -> None:
    global _received
    if signum == signal.SIGINT and _received == signal.SIGINT:
        raise KeyboardInterrupt
    _received = signum


def _nothing(signum: int, frame: FrameType | None) -> None:
    pass


def _leave(reading: int) -> None:
    while True:
        (number,) = os.read(reading, 1)
        if _leaving and number in SIGNALS:
            name = signal.Signals(number).name
            os.write(2, f"keel: warning: {name} before the first step; nothing was lost\n".encode())
            os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)
