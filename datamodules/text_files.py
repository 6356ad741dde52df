"""Corpora of one's own to token shards: UTF-8 files and folders, one document each."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from datamodules.format import ArraySpec, DataError
from datamodules.format.crc import crc32
from datamodules.store import NotFound, Store
from datamodules.text import CHUNK_TOKENS, document_splits
from datamodules.tokenizer import Bpe, Bytes, Tokenizer

SOME, SOME_BYTES = 256, 8 * 2**20  # documents tokenized at a time, unless one alone is larger


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


@dataclass(frozen=True)
class Document:
    """A file: its path in a store, its name below the one of the config's paths that it was found in, what it held."""

    store: Store = field(compare=False, repr=False)
    path: str
    name: str
    size: int
    crc32: int

    @property
    def url(self) -> str:
        return self.store.join(self.path)

    def text(self) -> str:
        """Its text, read again; `DataError` if it has changed."""
        content = self.store.read(self.path)
        if len(content) != self.size or crc32(content) != self.crc32:
            raise DataError(f"{self.url}: changed while the data set was being made; make it again, at another url")
        return content.decode()


def _listed(config: TextFilesConfig, seed: int) -> list[tuple[Store, str, str]]:
    """(store, path, name) of all files, each once, in an order that depends on `seed`, names and places in `paths` alone."""
    found: dict[str, tuple[bytes, int, str, Store, str]] = {}
    for i, path in enumerate(config.paths):
        folder, _, name = path.rstrip("/").rpartition("/")
        store = Store(path)
        below = [p for p in store.list() if fnmatch.fnmatch(p.rpartition("/")[2], config.pattern)]
        if not below:
            store = Store(folder or ("/" if path.startswith("/") else "."))
        for p in below or [name]:
            # The same name in two folders is two documents, far apart.
            drawn = hashlib.sha256(f"{seed}:{i}:{p}".encode()).digest()
            found.setdefault(store.join(p), (drawn, i, p, store, p))
    return [(store, p, name) for _, _, name, store, p in sorted(found.values(), key=lambda entry: entry[:3])]


def text_documents(config: TextFilesConfig, seed: int) -> Iterator[tuple[Document, str]]:
    """Documents with their text, one after the other; empty ones are left out.

    `DataError` for a path that is not there, for a file that is not UTF-8, and if there is nothing.
    """
    total = 0
    for store, path, name in _listed(config, seed):
        url = store.join(path)
        try:
            content = store.read(path)
        except NotFound as error:
            raise DataError(
                f"{url}: no such file, and no folder with files {config.pattern}; correct generator.paths"
            ) from error
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{url}: is not UTF-8 at byte {error.start}; convert it or leave it out") from error
        if config.max_bytes and total + len(content) > config.max_bytes and total:
            break
        if text:
            total += len(content)
            yield Document(store, path, name, len(content), crc32(content)), text
    if not total:
        raise DataError(f"{', '.join(config.paths)}: hold no text; correct generator.paths or generator.pattern")


@dataclass
class _Corpus:
    """What is known of all documents: where each ends in the array of tokens, and a digest of that array."""

    documents: list[Document]
    ends: np.ndarray
    sha256: str


class TextFiles:
    """Generator of token ids, array `tokens` [token]: documents, each followed by the separator.

    The smallest unsigned type that holds the vocabulary. The corpus is read once to count its tokens (twice more where a
    tokenizer is trained: for the sizes of the splits, and to train), then shard by shard: memory is a shard and a few
    documents, besides what training takes. The tokenizer is stored in the attributes, see
    `datamodules.tokenizer.tokenizer_of`.
    """

    config_class: ClassVar[type] = TextFilesConfig
    version: ClassVar[int] = 2

    def __init__(self, config: TextFilesConfig, seed: int, shard_bytes: int) -> None:
        self.config, self.seed, self._shard_bytes = config, seed, shard_bytes
        self._last: tuple[Document, np.ndarray] | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Given, loaded or trained."""
        name, separator = self.config.tokenizer, self.config.separator
        if name == "bytes":
            return Bytes()
        if name == "bpe":  # must not see what it is evaluated on
            documents = [document for document, _ in text_documents(self.config, self.seed)]
            train = documents[: self._cuts(documents)[0]]
            return Bpe.train((document.text() for document in train), self.config.vocab_size, separator)
        folder, _, file = name.rpartition("/")
        try:
            return Bpe(Store(folder or ".").read(file).decode(), separator, name)
        except NotFound as error:
            raise DataError(
                f"tokenizer={name!r}: is neither bytes nor bpe nor a file; correct generator.tokenizer"
            ) from error

    def _cuts(self, documents: list[Document]) -> tuple[int, int]:
        """Documents before validation, and before test."""
        sizes = np.array([document.size for document in documents])
        return document_splits(sizes, self.config.validation, self.config.test)

    def _encoded(self, texts: Iterable[tuple[Document, str]]) -> Iterator[tuple[Document, np.ndarray]]:
        """Documents with their tokens, the separator behind them."""
        tokenizer = self.tokenizer
        end = np.array([tokenizer.separator], self._dtype)
        for some in _batches(texts):
            for (document, _), ids in zip(some, tokenizer.encode([text for _, text in some]), strict=True):
                if (ids == tokenizer.separator).any():
                    raise DataError(
                        f"{document.url}: contains the separator {tokenizer.separator}; remove it or use a bpe"
                    )
                yield document, np.concatenate([ids.astype(self._dtype), end])

    @cached_property
    def _corpus(self) -> _Corpus:
        documents, lengths, digest = [], [], hashlib.sha256()
        for document, ids in self._encoded(text_documents(self.config, self.seed)):
            documents.append(document)
            lengths.append(len(ids))
            digest.update(ids.data)
        return _Corpus(documents, np.cumsum(lengths), digest.hexdigest())

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.min_scalar_type(self.tokenizer.vocab_size - 1)

    def specs(self) -> dict[str, ArraySpec]:
        tokens = int(self._corpus.ends[-1])
        length = max(1, self._shard_bytes // (CHUNK_TOKENS * self._dtype.itemsize)) * CHUNK_TOKENS
        return {"tokens": ArraySpec((tokens,), self._dtype.name, ("token",), length, CHUNK_TOKENS)}

    def attributes(self) -> dict[str, Any]:
        documents, ends = self._corpus.documents, self._corpus.ends
        tokens = int(ends[-1])
        first, second = (int(ends[cut - 1]) if cut else 0 for cut in self._cuts(documents))
        bounds = {"train": [0, first], "validation": [first, second], "test": [second, tokens]}
        size = sum(document.size for document in documents) + len(documents)
        return {
            "kind": "text",
            "array": "tokens",
            "splits": {name: pair for name, pair in bounds.items() if pair[0] < pair[1]},
            **self.tokenizer.attributes(),
            "bytes_per_token": size / tokens,
            "documents": len(documents),
            "units": {"tokens": "byte" if self.config.tokenizer == "bytes" else "id"},
        }

    def source(self) -> dict[str, Any]:
        return {"tokens_sha256": self._corpus.sha256}

    def values(self, name: str, k: int) -> np.ndarray:
        spec, ends = self.specs()[name], self._corpus.ends
        start = k * spec.shard_length
        stop = start + spec.shard_extent(k)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        at = int(ends[first - 1]) if first else 0
        out = np.empty(stop - start, self._dtype)
        wanted = self._corpus.documents[first : last + 1]
        # A document that goes on in the next shard is not read and tokenized again for it.
        held = [self._last] if self._last is not None and self._last[0] == wanted[0] else []
        for found in chain(held, self._encoded((document, document.text()) for document in wanted[len(held) :])):
            self._last, ids = found, found[1]
            low, high = max(at, start), min(at + len(ids), stop)
            out[low - start : high - start] = ids[low - at : high - at]
            at += len(ids)
        return out


def _batches(texts: Iterable[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    """Consecutive documents, at most SOME of them and about SOME_BYTES together."""
    held: list[tuple[Document, str]] = []
    size = 0
    for document, text in texts:
        if held and (len(held) == SOME or size + document.size > SOME_BYTES):
            yield held
            held, size = [], 0
        held.append((document, text))
        size += document.size
    if held:
        yield held
