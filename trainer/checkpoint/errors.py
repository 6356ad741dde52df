"""The errors of this sub-system."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, trusted or converted; the message names it and what to do."""


class CorruptCheckpoint(CheckpointError):
    """A committed checkpoint whose bytes are not those that were committed; an earlier one may serve."""
