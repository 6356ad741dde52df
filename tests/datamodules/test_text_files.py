"""Files to token shards: bytes and BPE, documents told apart, and refusals."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import registry
from datamodules.data import TextConfig, TextData
from datamodules.format import DataError, Dataset
from datamodules.make import MakeConfig, make
from datamodules.store import Store
from datamodules.text_files import TextFiles, TextFilesConfig, text_documents
from datamodules.tokenizer import Bpe, tokenizer_of
from tests.conftest import unavailable

TEXT = "the quick brown fox jumps over a lazy dog while naïve zebras größer ∂u/∂t = ν∇²u"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    root, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for i in range(30):
        path = root / ("deep/er" if i % 3 else "") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(rng.choice(WORDS, 40 + i)), encoding="utf-8")
    (root / "notes.md").write_text("no")
    (root / "empty.txt").write_text("")
    return str(root)


def need_tokenizers() -> None:
    if importlib.util.find_spec("tokenizers") is None:
        unavailable("BPE needs tokenizers: pip install 'keel[text]'")


def made(corpus: str, url: str, **generator: Any) -> Dataset:
    make(MakeConfig(url=url, generator={"name": "text_files", "paths": [corpus], **generator}, seed=1))
    return Dataset.open(url)


def documents_of(dataset: Dataset) -> list[str]:
    tokens, tokenizer = dataset.main.read((), 0, dataset.main.shape[0]), tokenizer_of(dataset.attributes)
    ends = np.flatnonzero(tokens == tokenizer.separator)
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends + 1)[:-1]]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_documents_come_back(corpus: str, tmp_path: Path, tokenizer: str) -> None:
    if tokenizer == "bpe":
        need_tokenizers()
    dataset = made(corpus, str(tmp_path), tokenizer=tokenizer, vocab_size=300)
    config = TextFilesConfig(paths=[corpus])
    texts = [text for _, text in text_documents(config, 1)]
    assert len(texts) == 30 and documents_of(dataset) == texts
    attributes, tokens = dataset.attributes, dataset.main.shape[0]
    assert attributes["vocab_size"] == (256 if tokenizer == "bytes" else 300)
    assert dataset.main.spec.dtype == ("uint8" if tokenizer == "bytes" else "uint16")
    assert attributes["bytes_per_token"] * tokens == pytest.approx(sum(len(t.encode()) + 1 for t in texts))
    assert attributes["bytes_per_token"] == 1 if tokenizer == "bytes" else attributes["bytes_per_token"] > 2
    for name, (start, stop) in dataset.splits.items():  # cut at the ends of documents
        assert start == 0 or dataset.main.read((), start - 1, start)[0] == attributes["separator"], name
        assert stop > start
    data = TextData(TextConfig(url=str(tmp_path), seq_len=32), global_batch=2)
    assert data.spec()["bytes_per_token"] == attributes["bytes_per_token"]
    assert registry.lookup("generator", "text_files") == (TextFilesConfig, TextFiles)


def test_a_bpe_is_the_same_each_time_and_can_be_given(corpus: str, tmp_path: Path) -> None:
    need_tokenizers()
    texts = [text for _, text in text_documents(TextFilesConfig(paths=[corpus]), 0)]
    first, second = (Bpe.train(iter(texts), 300, "<end>").attributes() for _ in range(2))
    assert first == second
    path = tmp_path / "own.json"
    path.write_text(first["tokenizer_json"])
    dataset = made(corpus, str(tmp_path / "data"), tokenizer=str(path), separator="<end>")
    assert dataset.attributes["tokenizer_json"] == first["tokenizer_json"] and len(documents_of(dataset)) == 30
    spelled = Bpe(first["tokenizer_json"], "<end>").encode(["a <end> b"])[0]
    assert first["separator"] not in spelled  # text cannot end a document
    with pytest.raises(DataError, match=r"own.json: has no token '<\|endoftext\|>'"):
        made(corpus, str(tmp_path / "other"), tokenizer=str(path))
    path.write_text("{}")
    with pytest.raises(DataError, match=r"own\.json: is not a tokenizer"):
        made(corpus, str(tmp_path / "other"), tokenizer=str(path))


def test_packed_documents_are_told_apart(corpus: str, tmp_path: Path) -> None:
    dataset = made(corpus, str(tmp_path))
    separator = dataset.attributes["separator"]
    data = TextData(TextConfig(url=str(tmp_path), seq_len=300, documents=True), global_batch=4)
    crossed = 0
    for batch in itertools.islice(data.train_dataloader(), 4):
        tokens, document, mask = batch["tokens"], batch["document"], batch["mask"]
        assert document.shape == (4, 301) and mask.shape == (4, 300) and mask.dtype == torch.bool
        for row in range(4):
            at = 0
            for i, token in enumerate(tokens[row].tolist()):
                assert document[row, i] == at
                at += token == separator
        # A target is due a loss exactly if it belongs to the document of its input.
        assert torch.equal(mask, document[:, 1:] == document[:, :-1])
        crossed += int((~mask).sum())
    data.teardown()
    assert crossed > 4
    plain = next(iter(TextData(TextConfig(url=str(tmp_path), seq_len=300), global_batch=4).val_dataloader()))
    assert sorted(plain) == ["index", "tokens"]


def test_paths_patterns_and_stores(corpus: str, memory: str) -> None:
    def names(**config: Any) -> set[str]:
        return {name for name, _ in text_documents(TextFilesConfig(**config), 0)}

    assert len(names(paths=[corpus])) == 30 and names(paths=[corpus], pattern="*.md") == {"notes.md"}
    assert names(paths=[f"{corpus}/0.txt", f"{corpus}/notes.md"]) == {"0.txt", "notes.md"}
    Store(memory).write("a/b.txt", b"there")
    assert names(paths=[memory]) == {"a/b.txt"} == {f"a/{n}" for n in names(paths=[f"{memory}/a"])}
    limited = text_documents(TextFilesConfig(paths=[corpus], max_bytes=1000), 0)
    assert limited == text_documents(TextFilesConfig(paths=[corpus]), 0)[: len(limited)]
    assert sum(len(text.encode()) for _, text in limited) <= 1000


def test_refusals(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    for config, error, message in (
        ({"paths": [str(tmp_path / "latin.txt")]}, DataError, "latin.txt: is not UTF-8 at byte 3"),
        ({"paths": [str(tmp_path / "none.txt")]}, DataError, "none.txt: no such file"),
        ({"paths": [f"{tmp_path}/zero.txt"]}, DataError, "zero.txt: contains the separator 0"),
        ({"paths": []}, ValueError, "paths: is empty"),
        ({"vocab_size": 256}, ValueError, "vocab_size=256"),
        ({"tokenizer": "bype"}, DataError, "'bype': is neither bytes nor bpe nor a file"),
    ):
        with pytest.raises(error, match=message) as caught:
            made(corpus, str(tmp_path / "data"), **{"validation": 0.0, "test": 0.0, **config})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="names none that is known"):
        tokenizer_of({"tokenizer": "words"})
