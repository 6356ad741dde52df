"""Which errors are the user's to mend, and how they are told."""

from datamodules.format import DataError
from datamodules.store import StoreError
from trainer.checkpoint.errors import CheckpointError
from trainer.config import ConfigError

# Each carries one clear line. Anything else is a defect and keeps its traceback.
USER_ERRORS = (ConfigError, StoreError, DataError, CheckpointError)


def one_line(error: BaseException) -> str:
    """The message of a user error as one line."""
    return "keel: error: " + " ".join(str(error).split())
