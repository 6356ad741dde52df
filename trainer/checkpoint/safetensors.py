"""The safetensors format (https://huggingface.co/docs/safetensors: eight bytes of header length, a JSON header, raw tensors), from
and to any store. A file's table of tensors has the form of a manifest's, so that both are read by the same code."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from datamodules.store import Store, StoreError
from trainer.checkpoint.errors import CheckpointError

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100 << 20  # bytes, a limit of the format


def read_table(store: Store, path: str) -> dict[str, Any]:
    """Name -> dtype, shape and the one chunk of each tensor of a file; its chunks have no checksum (`crc32c` None).

    Raises:
        CheckpointError: not a safetensors file, or a dtype that is not known here.
        StoreError: it cannot be read.
    """
    url, total = store.join(path), store.size(path)
    try:
        (length,) = struct.unpack("<Q", store.read_range(path, 0, 8))
        if not 2 <= length <= min(_MAX_HEADER, total - 8):
            raise ValueError(f"header of {length} bytes in a file of {total}")
        header = json.loads(store.read_range(path, 8, 8 + length))
        table = {
            name: _entry(path, entry, 8 + length, total) for name, entry in header.items() if name != "__metadata__"
        }
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(f"{url} is not a whole safetensors file: {error}") from error
    return table


def _entry(path: str, entry: dict[str, Any], base: int, total: int) -> dict[str, Any]:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    dtype, shape = _DTYPES[entry["dtype"]], [int(extent) for extent in entry["shape"]]
    start, end = entry["data_offsets"]
    size = math.prod(shape) * getattr(torch, dtype).itemsize
    if end - start != size or base + end > total:
        raise ValueError("a tensor's bytes do not fit its shape or the file")
    chunk = {"offsets": [0] * len(shape), "shape": shape, "file": path, "start": base + start, "bytes": size}
    return {"dtype": dtype, "shape": shape, "chunks": [{**chunk, "crc32c": None}] if size else []}


def write(
    target: Store,
    path: str,
    tensors: Mapping[str, tuple[str, list[int]]],
    content: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> int:
    """Writes one file, whole or not at all, tensor by tensor. Returns its bytes.

    Args:
        target, path: where.
        tensors: name -> (dtype, shape).
        content: gives each tensor when its turn comes.
        metadata: plain strings for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in _NAMES:
            raise CheckpointError(f"{name} has dtype {dtype}, which safetensors does not know; choose another --dtype")
        size = math.prod(shape) * getattr(torch, dtype).itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)

    def parts() -> Iterator[Any]:
        yield struct.pack("<Q", len(raw)) + raw
        for name in tensors:
            tensor = content(name).contiguous()
            if tensor.numel():
                yield tensor.reshape(-1).view(torch.uint8).numpy().data

    target.write_pieces(path, parts(), 8 + len(raw) + end)
    return 8 + len(raw) + end
