"""One piece of work at a time beside training."""

import threading
from collections.abc import Callable
from typing import Any


class Flight:
    """Runs work in a thread, one at a time; what it raised is raised where training looks: by `poll` or `wait`.

    The thread is a daemon: a process that must end does not wait for a slow store.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()

    def start(self, work: Callable[[], Any], name: str) -> None:
        """Begins `work`; the work before must have been waited for."""
        assert self._thread is None, "one piece of work at a time: wait() first"

        begun = threading.Event()

        def run() -> None:
            begun.wait()  # else the caller would wait for the interpreter until the work first waits for something
            try:
                work()
            except BaseException as error:  # also what torch derives from BaseException: nothing may be lost here
                self._error = error
            finally:
                self._done.set()

        self._done.clear()
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()
        begun.set()

    def poll(self) -> bool:
        """Whether work has ended since the last call; raises what it raised. Never waits."""
        if self._thread is None or not self._done.is_set():
            return False
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for the work to end, at most `seconds`; False when it has not. Raises what it raised."""
        if self._thread is None:
            return True
        if not self._done.wait(seconds):
            return False
        self.poll()
        return True
