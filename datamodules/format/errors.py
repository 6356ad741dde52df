"""The error of the data format."""

from __future__ import annotations


class DataError(ValueError):
    """A data set is missing, unfinished, damaged or not what was asked for. One line: the URL, the fault, what to do."""
