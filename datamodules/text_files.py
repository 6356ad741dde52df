"""Corpora of one's own to token shards: UTF-8 files and folders, one document each."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from datamodules.format import ArraySpec, DataError
from datamodules.store import NotFound, Store
from datamodules.text import CHUNK_TOKENS, document_splits
from datamodules.tokenizer import Bpe, Bytes, Tokenizer

SOME = 256  # documents tokenized at a time


@dataclass
class TextFilesConfig:
    """Text files as tokens.

    paths: files and folders, local or URLs; folders with all that is below. pattern: of the names of files in folders.
    tokenizer: "bytes"; "bpe", trained on the train split; or the path or URL of a JSON of the `tokenizers` library.
    vocab_size: of a "bpe" to be trained. separator: the token that ends a document, for all but bytes.
    max_bytes: documents are taken until this many bytes are reached; 0 takes all.
    validation, test: shares of the documents' bytes; the rest is the train split.
    """

    paths: list[str] = field(default_factory=list)
    pattern: str = "*.txt"
    tokenizer: str = "bytes"
    vocab_size: int = 8192
    separator: str = "<|endoftext|>"
    max_bytes: int = 0
    validation: float = 0.05
    test: float = 0.05

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths: is empty; list files or folders")
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 257, the bytes and the separator")
        if self.max_bytes < 0:
            raise ValueError(f"max_bytes={self.max_bytes}: must be >= 0; 0 takes all")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError(f"validation={self.validation}, test={self.test}: must be >= 0 and leave a train split")


def text_documents(config: TextFilesConfig, seed: int) -> list[tuple[str, str]]:
    """(name, text) of the files, in an order that depends on their names and `seed` alone; empty ones are left out.

    `DataError` for a path that is not there, for a file that is not UTF-8, and if there is nothing.
    """
    found: dict[str, tuple[Store, str]] = {}
    for path in config.paths:
        folder, _, name = path.rstrip("/").rpartition("/")
        below = [p for p in Store(path).list() if fnmatch.fnmatch(p.rpartition("/")[2], config.pattern)]
        if below:
            found |= {p: (Store(path), p) for p in below}
        else:
            found[name] = (Store(folder or "."), name)
    names = sorted(found, key=lambda name: (hashlib.sha256(f"{seed}:{name}".encode()).digest(), name))
    documents: list[tuple[str, str]] = []
    total = 0
    for name in names:
        store, path = found[name]
        try:
            content = store.read(path)
        except NotFound as error:
            raise DataError(
                f"{store.join(path)}: no such file, and no folder with files {config.pattern}; correct generator.paths"
            ) from error
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{store.join(path)}: is not UTF-8 at byte {error.start}; convert it or leave it out"
            ) from error
        if config.max_bytes and total + len(content) > config.max_bytes and documents:
            break
        if text:
            documents.append((name, text))
            total += len(content)
    if not documents:
        raise DataError(f"{', '.join(config.paths)}: hold no text; correct generator.paths or generator.pattern")
    return documents


class TextFiles:
    """Generator of token ids, array `tokens` [token]: documents, each followed by the separator.

    The smallest unsigned type that holds the vocabulary. The whole corpus is held in memory, and tokenized by every worker
    process. The tokenizer is stored in the attributes, see `datamodules.tokenizer.tokenizer_of`.
    """

    config_class: ClassVar[type] = TextFilesConfig
    version: ClassVar[int] = 1

    def __init__(self, config: TextFilesConfig, seed: int, shard_bytes: int) -> None:
        self.config, self.seed, self._shard_bytes = config, seed, shard_bytes

    @cached_property
    def _documents(self) -> list[tuple[str, str]]:
        return text_documents(self.config, self.seed)

    @cached_property
    def _cuts(self) -> tuple[int, int]:
        """Documents before validation, and before test."""
        sizes = np.array([len(text.encode()) for _, text in self._documents])
        return document_splits(sizes, self.config.validation, self.config.test)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Given, loaded or trained."""
        name, separator = self.config.tokenizer, self.config.separator
        if name == "bytes":
            return Bytes()
        if name == "bpe":  # must not see what it is evaluated on
            texts = (text for _, text in self._documents[: self._cuts[0]])
            return Bpe.train(texts, self.config.vocab_size, separator)
        folder, _, file = name.rpartition("/")
        try:
            return Bpe(Store(folder or ".").read(file).decode(), separator, name)
        except NotFound as error:
            raise DataError(
                f"tokenizer={name!r}: is neither bytes nor bpe nor a file; correct generator.tokenizer"
            ) from error

    @cached_property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """All tokens, and where each document ends."""
        tokenizer, parts = self.tokenizer, []
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        end = np.array([tokenizer.separator], dtype)
        for i in range(0, len(self._documents), SOME):
            some = self._documents[i : i + SOME]
            for (name, _), ids in zip(some, tokenizer.encode([text for _, text in some]), strict=True):
                if (ids == tokenizer.separator).any():
                    raise DataError(f"{name}: contains the separator {tokenizer.separator}; remove it or use a bpe")
                parts += [ids.astype(dtype), end]
        return np.concatenate(parts), np.cumsum([len(a) + 1 for a in parts[::2]])

    @property
    def _shard_length(self) -> int:
        per = CHUNK_TOKENS * self._tokens[0].itemsize
        return max(1, self._shard_bytes // per) * CHUNK_TOKENS

    def specs(self) -> dict[str, ArraySpec]:
        tokens = self._tokens[0]
        return {"tokens": ArraySpec((tokens.size,), tokens.dtype.name, ("token",), self._shard_length, CHUNK_TOKENS)}

    def attributes(self) -> dict[str, Any]:
        tokens, ends = self._tokens
        first, second = (int(ends[cut - 1]) if cut else 0 for cut in self._cuts)
        bounds = {"train": [0, first], "validation": [first, second], "test": [second, len(tokens)]}
        size = sum(len(text.encode()) for _, text in self._documents) + len(self._documents)
        return {
            "kind": "text",
            "array": "tokens",
            "splits": {name: pair for name, pair in bounds.items() if pair[0] < pair[1]},
            **self.tokenizer.attributes(),
            "bytes_per_token": size / len(tokens),
            "documents": len(self._documents),
            "units": {"tokens": "byte" if self.config.tokenizer == "bytes" else "id"},
        }

    def source(self) -> dict[str, Any]:
        return {"tokens_sha256": hashlib.sha256(self._tokens[0].data).hexdigest()}

    def values(self, name: str, k: int) -> np.ndarray:
        return self._tokens[0][k * self._shard_length : (k + 1) * self._shard_length]
