"""Which errors are the user's to mend, which may pass by themselves, and how they are told."""

import os

from datamodules.format import DataError
from datamodules.store import Unreachable
from trainer.checkpoint.errors import CheckpointError
from trainer.config import ConfigError
from trainer.restarts import EXIT_UNAVAILABLE

EXIT_FAILURE, EXIT_USER_ERROR = 1, 2

# Each carries one clear line; a store's errors are OSErrors, as is a file that cannot be used. Anything else is a defect
# and keeps its traceback.
USER_ERRORS = (ConfigError, DataError, CheckpointError, OSError)


class Defect(RuntimeError):
    """A failure of the machine that one line says all about; a new start from the last commit may help."""


def is_user_error(error: BaseException) -> bool:
    """Whether one line says it all."""
    return isinstance(error, USER_ERRORS)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that `error` ends: `EXIT_UNAVAILABLE` where a later start may succeed as it is, since
    the store did not answer in time; `EXIT_USER_ERROR` where somebody must mend something first."""
    if isinstance(error, Unreachable | ConnectionError | TimeoutError):
        return EXIT_UNAVAILABLE
    return EXIT_USER_ERROR if is_user_error(error) else EXIT_FAILURE


def one_line(error: BaseException) -> str:
    """The message of a user error as one line."""
    return "keel: error: " + " ".join(str(error).split())


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks (`KEEL_TRACEBACK=1`)."""
    return os.environ.get("KEEL_TRACEBACK", "") not in ("", "0")
