"""Corpora to token shards. Here: the source files of Python's own standard library, as bytes."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from datamodules.format import ArraySpec, DataError
from datamodules.simulators.base import split_ranges

CHUNK_TOKENS = 65536
SEPARATOR = 0
# Not the library's own source: installed packages, byte code, tests, and what is generated (code tables, manual pages).
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


@dataclass
class StdlibTextConfig:
    """Python's standard library as bytes.

    max_bytes: documents are taken until this many bytes are reached; 0 takes all (some 10 MB).
    validation, test: shares of the bytes, at document boundaries; the rest is the train split.
    """

    max_bytes: int = 0
    validation: float = 0.05
    test: float = 0.05

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise ValueError(f"max_bytes={self.max_bytes}: must be >= 0; 0 takes all")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError(f"validation={self.validation}, test={self.test}: must be >= 0 and leave a train split")


def stdlib_documents(seed: int, max_bytes: int, root: str | None = None) -> list[tuple[str, bytes]]:
    """(path, content) of the library's `.py` files in an order that depends on the paths and `seed` alone.

    Files that are empty or contain the separator are left out. DataError if there are none.
    """
    root = root or sysconfig.get_paths()["stdlib"]
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        names += [prefix + name for name in files if name.endswith(".py")]
    names.sort(key=lambda name: (hashlib.sha256(f"{seed}:{name}".encode()).digest(), name))
    documents, total = [], 0
    for name in names:
        with open(os.path.join(root, *name.split("/")), "rb") as file:
            content = file.read()
        if not content or SEPARATOR in content:
            continue
        if max_bytes and total + len(content) + 1 > max_bytes:
            if total:
                break
            content = content[: max_bytes - 1]
        documents.append((name, content))
        total += len(content) + 1
    if not documents:
        raise DataError(f"{root}: holds no .py files; install Python with its standard library as source")
    return documents


def document_splits(sizes: np.ndarray, validation: float, test: float) -> tuple[int, int]:
    """Number of documents before the validation split and before the test split, nearest to the shares of all sizes.

    ValueError if no document is left to train on.
    """
    ends = np.cumsum([0, *sizes.tolist()])
    first, second = (int(np.abs(ends - share * ends[-1]).argmin()) for share in (1.0 - validation - test, 1.0 - test))
    if first == 0:
        raise ValueError(f"validation={validation}, test={test}: leave no document to train on")
    return first, second


class StdlibText:
    """Generator of byte tokens, array `tokens` [token] uint8: documents, each followed by a zero byte.

    The bytes depend on the installed Python; `source` has its version and the digest of all tokens.
    """

    config_class: ClassVar[type] = StdlibTextConfig
    version: ClassVar[int] = 1

    def __init__(self, config: StdlibTextConfig, seed: int, shard_bytes: int) -> None:
        self.config, self.seed = config, seed
        self.shard_length = max(1, shard_bytes // CHUNK_TOKENS) * CHUNK_TOKENS

    @cached_property
    def _documents(self) -> list[tuple[str, bytes]]:
        return stdlib_documents(self.seed, self.config.max_bytes)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.frombuffer(b"".join(content + bytes([SEPARATOR]) for _, content in self._documents), np.uint8)

    def _splits(self) -> dict[str, list[int]]:
        """Train, validation, test in the order of the documents, cut at the document boundaries nearest to their shares."""
        sizes = np.array([len(content) + 1 for _, content in self._documents])
        cuts = document_splits(sizes, self.config.validation, self.config.test)
        first, second = (int(sizes[:cut].sum()) for cut in cuts)
        ends = np.cumsum(sizes)
        return split_ranges(train=first, validation=second - first, test=int(ends[-1]) - second)

    def specs(self) -> dict[str, ArraySpec]:
        return {"tokens": ArraySpec((self._tokens.size,), "uint8", ("token",), self.shard_length, CHUNK_TOKENS)}

    def attributes(self) -> dict[str, Any]:
        return {
            "kind": "text",
            "array": "tokens",
            "splits": self._splits(),
            "vocab_size": 256,
            "separator": SEPARATOR,
            "tokenizer": "bytes",
            "documents": len(self._documents),
            "units": {"tokens": "byte"},
        }

    def source(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._tokens.data).hexdigest()
        return {"python": platform.python_version(), "tokens_sha256": digest}

    def values(self, name: str, k: int) -> np.ndarray:
        return self._tokens[k * self.shard_length : (k + 1) * self.shard_length]
