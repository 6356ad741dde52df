"""Writes or reads one case with one library, inside that library's environment; the result is one line of JSON.

    python stream_worker.py write '{"library": ..., "case": ..., "quick": ..., "folder": ...}'
    python stream_worker.py read  '{... "url": ..., "cache": ..., "workers": ..., "epochs": ..., "states": folder}'
    python stream_worker.py resume '{... "share": 0.25}'

Peers are used as their documentation says, with the work-arounds named in the comments.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch
from stream_cases import BATCH, SHARD_BYTES, Case, cases, cpu_since, forget, item

SEED = 7
RESUME_AT = (0.25, 0.75)  # of an epoch


def to_batch(case: Case, samples: list[Any]) -> torch.Tensor:
    """Samples as one tensor: float32, or int64 for tokens."""
    stacked = torch.stack([torch.as_tensor(sample) for sample in samples])
    return stacked.to(torch.int64) if case.dtype == "uint16" else stacked


def cut(case: Case, value: Any) -> Any:
    return value[: case.window] if case.window else value


class Collate:
    """Picklable collate function of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, samples: list[Any]) -> torch.Tensor:
        found = [sample["x"] if isinstance(sample, dict) else sample for sample in samples]
        if self.case.dtype == "uint16":
            found = [np.asarray(sample).astype("i8") for sample in found]
        return to_batch(self.case, found)


class Mosaic:
    def __init__(self, spec: dict[str, Any], case: Case) -> None:
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()

        class Windows(StreamingDataset):
            def __getitem__(self, index: Any) -> Any:
                return cut(case, super().__getitem__(index)["x"])

        remote = spec["url"] if spec["url"].startswith("s3://") else None
        self.dataset = Windows(
            remote=remote,
            local=spec["cache"] if remote else spec["url"],
            shuffle=True,
            shuffle_seed=SEED,
            batch_size=BATCH,
            num_canonical_nodes=1,
        )
        if remote:
            # The client that read the index is inherited by forked workers, which then stall for a minute; drop it.
            for stream in self.dataset.streams:
                stream._downloader.clean_up()
        self.loader = StreamingDataLoader(
            self.dataset,
            batch_size=BATCH,
            num_workers=spec["workers"],
            persistent_workers=spec["workers"] > 0,
            drop_last=True,
            collate_fn=Collate(case),
        )

    def epoch(self) -> Iterator[torch.Tensor]:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)

    @staticmethod
    def write(case: Case, folder: str) -> None:
        from streaming import MDSWriter

        kind = f"ndarray:{case.dtype}:{','.join(map(str, case.shape))}"
        with MDSWriter(out=folder, columns={"x": kind}, size_limit=SHARD_BYTES + (1 << 20)) as out:
            for i in range(case.items):
                out.write({"x": item(case, i)})


class LitData:
    def __init__(self, spec: dict[str, Any], case: Case) -> None:
        import litdata
        from litdata.streaming import downloader

        # Its reads of chunks refuse an http:// endpoint, and no setting allows one.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True

        class Windows(litdata.StreamingDataset):
            def __getitem__(self, index: Any) -> Any:
                value = super().__getitem__(index)
                return cut(case, value["x"] if isinstance(value, dict) else value)

        more: dict[str, Any] = {}
        if case.dtype == "uint16":
            more["item_loader"] = litdata.TokensLoader(block_size=case.shape[0])
        if spec["url"].startswith("s3://"):
            # A cache below the folder of the run, so that no run finds what another has left.
            more["storage_options"] = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
            more["cache_dir"] = spec["cache"]
        self.dataset = Windows(spec["url"], shuffle=True, seed=SEED, drop_last=True, **more)
        self.loader = litdata.StreamingDataLoader(
            self.dataset,
            batch_size=BATCH,
            num_workers=spec["workers"],
            persistent_workers=spec["workers"] > 0,
            collate_fn=Collate(case),
        )

    def epoch(self) -> Iterator[torch.Tensor]:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)

    @staticmethod
    def write(case: Case, folder: str) -> None:
        from litdata.streaming.cache import Cache
        from litdata.streaming.item_loader import TokensLoader

        tokens = case.dtype == "uint16"
        cache = Cache(
            folder,
            chunk_bytes=None if tokens else SHARD_BYTES + (1 << 20),
            chunk_size=case.per_shard * case.shape[0] if tokens else None,
            item_loader=TokensLoader(block_size=case.shape[0]) if tokens else None,
        )
        for i in range(case.items):
            value = item(case, i)
            cache[i] = torch.from_numpy(value.astype("i4")).to(torch.uint16) if tokens else {"x": value}
        cache.done()
        cache.merge()


class WebDataset:
    def __init__(self, spec: dict[str, Any], case: Case) -> None:
        import webdataset as wds

        remote = spec["url"].startswith("s3://")
        if remote:
            sys.modules["webdataset.gopen"].gopen_schemes["s3"] = _open_s3  # type: ignore[attr-defined]
            os.makedirs(spec["cache"], exist_ok=True)
        shards = -(-case.items // case.per_shard)
        urls = [f"{spec['url']}/shard-{k:05d}.tar" for k in range(shards)]
        collate = Collate(case)

        def decode(sample: dict[str, Any]) -> Any:
            return cut(case, np.frombuffer(sample["bin"], case.dtype).reshape(case.shape).copy())

        self.dataset = (
            wds.WebDataset(
                urls, shardshuffle=len(urls), seed=SEED, cache_dir=spec["cache"] if remote else None, empty_check=False
            )
            .shuffle(case.per_shard * 2)
            .map(decode)
            .batched(BATCH, collation_fn=collate, partial=True)
        )
        self.loader = wds.WebLoader(
            self.dataset, batch_size=None, num_workers=spec["workers"], persistent_workers=spec["workers"] > 0
        )

    def epoch(self) -> Iterator[torch.Tensor]:
        yield from self.loader

    @staticmethod
    def write(case: Case, folder: str) -> None:
        import webdataset as wds

        with wds.ShardWriter(f"{folder}/shard-%05d.tar", maxcount=case.per_shard, verbose=0) as out:
            for i in range(case.items):
                out.write({"__key__": f"{i:06d}", "bin": item(case, i).tobytes()})


def _open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> Any:
    """webdataset has no reader for s3:// of its own; one client per process, as forked ones do not work."""
    import boto3
    from botocore.config import Config

    global _client
    if _client is None or _client[0] != os.getpid():
        config = Config(s3={"addressing_style": "path"}, response_checksum_validation="when_required")
        _client = (os.getpid(), boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], config=config))
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return _client[1].get_object(Bucket=bucket, Key=key)["Body"]


_client: Any = None


class Keel:
    """`fetch`: the policy, see `StreamConfig.fetch`."""

    def __init__(self, spec: dict[str, Any], case: Case) -> None:
        from datamodules.data import FieldsConfig, FieldsData, TextConfig, TextData

        self.case = case
        common = {"url": spec["url"], "cache": spec["cache"], "threads": spec["workers"], "fetch": spec["fetch"]}
        if case.dtype == "uint16":
            self.data: Any = TextData(TextConfig(**common, seq_len=case.shape[0] - 1), global_batch=BATCH, seed=SEED)
        else:
            length = case.shape[0] if len(case.shape) == 4 else 1
            frames = case.window or length
            # One window of each trajectory, as the peers read.
            stride = length - frames + 1
            self.data = FieldsData(FieldsConfig(**common, frames=frames, stride=stride), global_batch=BATCH, seed=SEED)
        self.data.configure(1, 0)
        self.stream = self.data.train_dataloader()
        self.batches: Any = None

    def epoch(self) -> Iterator[torch.Tensor]:
        self.batches = self.batches or iter(self.stream)
        for _ in range(self.case.items // BATCH):
            batch = next(self.batches)
            self.data.advance(BATCH)
            yield batch["tokens"] if "tokens" in batch else batch["fields"]

    def state(self) -> Any:
        return self.data.state_dict()

    def load(self, state: Any) -> None:
        self.data.load_state_dict(state)

    def close(self) -> None:
        self.data.teardown()

    @staticmethod
    def write(case: Case, folder: str) -> None:
        from datamodules.format import ArraySpec, write_dataset

        everything = {"train": [0, case.items]}
        if case.dtype == "uint16":
            values = np.concatenate([item(case, i)[:-1] for i in range(case.items)] + [np.array([case.items], "u2")])
            chunk = 1 << 16
            spec = ArraySpec(
                values.shape, "uint16", ("token",), shard_length=SHARD_BYTES // 2 // chunk * chunk, chunk_length=chunk
            )
            attributes = {"kind": "text", "array": "x", "vocab_size": 65536, "splits": {"train": [0, values.size]}}
        else:
            values = np.stack([item(case, i) for i in range(case.items)])
            values = values[:, None] if values.ndim == 4 else values
            dimensions = ("trajectory", "time", "channel", "y", "x")
            spec = ArraySpec(values.shape, case.dtype, dimensions, shard_length=case.per_shard)
            channels = [f"c{i}" for i in range(values.shape[2])]
            attributes = {"kind": "fields", "array": "x", "channels": channels, "splits": everything}
        write_dataset(folder, {"x": spec}, {"x": values}, attributes)


LIBRARIES: dict[str, Any] = {"keel": Keel, "mosaicml-streaming": Mosaic, "litdata": LitData, "webdataset": WebDataset}


def ids(batch: torch.Tensor) -> list[int]:
    return [int(value) for value in batch.reshape(len(batch), -1)[:, 0].tolist()]


def read(spec: dict[str, Any]) -> dict[str, Any]:
    """A cold epoch, then cached ones, then one that saves states on its way."""
    case = cases(spec["quick"])[spec["case"]]
    make = LIBRARIES[spec["library"]]
    torch.set_num_threads(1)
    _import(spec["library"], spec["url"])
    if not spec["url"].startswith("s3://"):
        forget(spec["url"])
    result: dict[str, Any] = {"import_s": time.perf_counter() - STARTED, "cold_from": time.time()}

    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    reader = make(spec, case)
    seen: list[int] = []
    for batch in reader.epoch():
        if not seen:
            result["first_batch_s"] = time.perf_counter() - began
            assert batch[0].numel() * np.dtype(case.dtype).itemsize == case.sample_bytes, batch.shape
        seen += ids(batch)
    if not seen:
        raise SystemExit("read no sample")
    result["cold_s"], result["cold_samples"] = time.perf_counter() - began, len(seen)
    result["exact"] = sorted(seen) == list(range(case.items))
    result["cold_until"], result["rss"] = time.time(), []
    if spec["library"] == "keel":  # the others read in processes of their own
        result["cpu_s"] = cpu_since(used)

    samples, spent, epochs = 0, 0.0, 0
    began = time.perf_counter()
    while epochs < spec["epochs"] or (spent < spec["seconds"] and epochs < 1000):
        samples += sum(len(batch) for batch in reader.epoch())
        spent, epochs = time.perf_counter() - began, epochs + 1
        result["rss"].append(_rss())
    result["cached_s"], result["cached_samples"], result["cached_epochs"] = spent, samples, epochs
    if spec["states"] and hasattr(reader, "state"):
        for i, _ in enumerate(reader.epoch()):
            for share in RESUME_AT:
                if i + 1 == max(1, int(share * case.items) // BATCH):
                    with open(_state_file(spec, share), "wb") as file:
                        pickle.dump(reader.state(), file)
        result["states"] = True
    return result


def _rss() -> int:
    """Resident bytes of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resume(spec: dict[str, Any]) -> dict[str, Any]:
    """From a saved state to the next batch, in a new process, the data cached; seconds after the library's import."""
    case = cases(spec["quick"])[spec["case"]]
    with open(_state_file(spec, spec["share"]), "rb") as file:
        state = pickle.load(file)
    torch.set_num_threads(1)
    _import(spec["library"], spec["url"])
    began = time.perf_counter()
    reader = LIBRARIES[spec["library"]](spec, case)
    reader.load(state)
    next(iter(reader.epoch()))
    return {"resume_s": time.perf_counter() - began}


def _state_file(spec: dict[str, Any], share: float) -> str:
    return os.path.join(spec["states"], f"{share}.pickle")


CLIENTS = {"keel": ("s3fs",), "litdata": ("boto3", "obstore")}


def _import(library: str, url: str = "") -> None:
    """The library and what it reads S3 with: the time of imports is no matter here."""
    for client in CLIENTS.get(library, ("boto3",)) if url.startswith("s3://") else ():
        importlib.import_module(client)
    if library == "keel":
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
        library = "datamodules.data"
    importlib.import_module({"mosaicml-streaming": "streaming"}.get(library, library))


def main() -> None:
    action, spec = sys.argv[1], json.loads(sys.argv[2])
    if action == "write":
        _import(spec["library"])
        os.makedirs(spec["folder"], exist_ok=True)
        LIBRARIES[spec["library"]].write(cases(spec["quick"])[spec["case"]], spec["folder"])
        print("{}")
        return
    print(json.dumps({"read": read, "resume": resume}[action](spec)), flush=True)
    # Some readers leave workers and threads that wait for each other at exit.
    sys.stdout.flush()
    os._exit(0)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()
