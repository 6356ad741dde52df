"""Streams for a training loop of one's own: a plain PyTorch iterable, without Lightning's or Keel's trainer.

Example::

    from torch.utils.data import DataLoader
    from datamodules.loader import StreamingDataset

    stream = StreamingDataset("s3://bucket/data", global_batch=64, world_size=world_size, rank=rank, frames=8)
    if os.path.exists("state.json"):
        stream.load_state_dict(json.load(open("state.json")))  # saved on any number of ranks and workers
    for step, batch in enumerate(DataLoader(stream, batch_size=None, num_workers=2)):
        train(batch["fields"])  # float32 [64 / world_size, 8, C, *S]
        stream.advance()
        if step % 100 == 0 and rank == 0:
            json.dump(stream.state_dict(), open("state.json", "w"))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from datamodules.module import StreamingDataModule
from datamodules.registry import lookup
from datamodules.stream.metrics import Metrics
from datamodules.stream.stream import FiniteStream, Stream


class StreamingDataset(IterableDataset[dict[str, Tensor]]):
    """This rank's batches of a data set, for ever, in an order that depends on the data, the seed and the position alone.

    Iterate it itself (it reads ahead with threads) or through ``DataLoader(stream, batch_size=None, num_workers=w)``: the
    batches and their order are the same. Iteration begins at the current position. Its threads make batches in pinned memory
    once CUDA is in use; worker processes cannot, so give their loader ``pin_memory=True``. Small batches that follow each other
    share memory: ``clone`` what you keep or save of one.

    Args:
        url: the data set, on any store; none for a mixture, whose ``sources`` name theirs.
        global_batch: samples of a step over all ranks.
        micro_batch: samples of one batch; 0 for all of a rank's part of the global batch.
        world_size, rank: of this process.
        seed: of the order.
        kind: name of the kind of data, see ``datamodules.registry.DATA``.
        settings: fields of that kind's config, such as ``frames``, ``train``, ``fetch`` or ``cache``.

    Raises ``ValueError`` for settings and sizes that cannot be, ``DataError`` for data that are not as asked, and
    ``StoreError`` where they cannot be read.
    """

    def __init__(
        self,
        url: str = "",
        *,
        global_batch: int,
        micro_batch: int = 0,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        kind: str = "fields",
        **settings: Any,
    ) -> None:
        config_class, data_class = lookup("data", kind)
        known = [entry.name for entry in fields(config_class)]
        if url:
            settings["url"] = url
        for name in settings:
            if name not in known:
                raise ValueError(f"{name}: no such field of {config_class.__name__}; known: {', '.join(known)}")
        config = config_class(**settings)
        self._data: StreamingDataModule = data_class(
            config, global_batch=global_batch, micro_batch=micro_batch, seed=seed
        )
        self._data.configure(world_size, rank)
        self._stream: Stream = self._data.train_dataloader()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._stream)

    def advance(self, steps: int = 1) -> None:
        """So many global batches are done: call it after each optimiser step."""
        self._data.advance(steps * self._data.global_batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is and what decides its order: plain numbers and strings, the same on all ranks."""
        return self._data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, at the next iteration. ``DataError`` if it belongs to other data or another order."""
        self._data.load_state_dict(state)

    def validation(self, split: str = "validation", batch: int = 0, limit: int = 0) -> FiniteStream:
        """A split once, in order; at most ``limit`` (0: all) samples, evenly spaced."""
        return self._data.evaluation_loader(split, batch=batch, limit=limit)

    @property
    def metrics(self) -> Metrics:
        """Bytes fetched and used, cache hits, waiting time."""
        return self._data.metrics

    def spec(self) -> dict[str, Any]:
        """What the data are: channels, space, statistics, fingerprint, ..."""
        return self._data.spec()

    def close(self) -> None:
        """End all threads."""
        self._data.teardown()

    def __getstate__(self) -> dict[str, Any]:
        return {"_stream": self._stream}  # all that a worker process needs
