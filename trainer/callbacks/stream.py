"""Keeps the data stream's position in step with the optimiser."""

from datamodules.position import StreamPosition

__all__ = ["StreamPosition"]
