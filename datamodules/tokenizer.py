"""Tokenizers of text data sets: bytes, or a byte-level BPE of the `tokenizers` library that the data set carries along.

Byte-level BPE: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); merges by frequency: Sennrich
et al., arXiv:1508.07909.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from datamodules.format import DataError


class Tokenizer(Protocol):
    """Text to token ids and back. `separator` ends each document and stands for no text."""

    kind: str
    vocab_size: int
    separator: int

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """Ids of each document, without the separator."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; separators and bytes that are no whole character in UTF-8 are left out or replaced."""

    def attributes(self) -> dict[str, Any]:
        """What a data set stores to make this tokenizer again: plain JSON."""


class Bytes:
    """The bytes of UTF-8; 0 separates documents, so none may contain it."""

    kind, vocab_size, separator = "bytes", 256, 0

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(document.encode(), np.uint8) for document in documents]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != self.separator).decode(errors="replace")

    def attributes(self) -> dict[str, Any]:
        return {"tokenizer": self.kind, "vocab_size": self.vocab_size, "separator": self.separator}


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("tokenizer: the library is not installed; pip install 'keel[text]', or use bytes") from error
    return tokenizers


class Bpe:
    """A tokenizer of the `tokenizers` library, from its JSON. `DataError` if it is not one or lacks the separator."""

    kind = "bpe"

    def __init__(self, document: str, separator: str, where: str = "tokenizer") -> None:
        try:
            self._own = _library().Tokenizer.from_str(document)
        except DataError:
            raise
        except Exception as error:  # the library raises bare exceptions
            raise DataError(f"{where}: is not a tokenizer of the tokenizers library ({error})") from error
        found = self._own.token_to_id(separator)
        if found is None:
            raise DataError(
                f"{where}: has no token {separator!r} to end documents with; set generator.separator to one"
            )
        self.separator, self.vocab_size, self._name = int(found), int(self._own.get_vocab_size()), separator
        self._own.encode_special_tokens = True  # a document that spells the separator does not end there

    def __reduce__(self) -> tuple[Any, ...]:
        return Bpe, (self._own.to_str(), self._name)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, separator: str) -> Bpe:
        """Byte-level BPE of `vocab_size` tokens (at least 257: the bytes and the separator), the same for the same text."""
        library = _library()
        own = library.Tokenizer(library.models.BPE())
        own.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        own.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[separator],
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        own.train_from_iterator(documents, trainer)
        return cls(own.to_str(), separator)

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        found = self._own.encode_batch(list(documents), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._own.decode([int(i) for i in ids], skip_special_tokens=True))

    def attributes(self) -> dict[str, Any]:
        return {
            "tokenizer": self.kind,
            "tokenizer_json": self._own.to_str(),
            "vocab_size": self.vocab_size,
            "separator": self.separator,
            "separator_token": self._name,
        }


def tokenizer_of(attributes: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a data set from its attributes. `DataError` if it names none."""
    kind = attributes.get("tokenizer")
    if kind == Bytes.kind:
        return Bytes()
    if kind == Bpe.kind:
        return Bpe(str(attributes["tokenizer_json"]), str(attributes["separator_token"]))
    raise DataError(f"tokenizer={kind!r}: the data set names none that is known (bytes, bpe)")
