"""Files to token shards: bytes and BPE, documents told apart, and refusals."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import registry, text_files
from datamodules.data import TextConfig, TextData
from datamodules.format import DataError, Dataset
from datamodules.make import MakeConfig, make
from datamodules.store import Store
from datamodules.text_files import Document, TextFiles, TextFilesConfig, text_documents
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
        return {document.name for document, _ in text_documents(TextFilesConfig(**config), 0)}

    assert len(names(paths=[corpus])) == 30 and names(paths=[corpus], pattern="*.md") == {"notes.md"}
    assert names(paths=[f"{corpus}/0.txt", f"{corpus}/notes.md"]) == {"0.txt", "notes.md"}
    Store(memory).write("a/b.txt", b"there")
    assert names(paths=[memory]) == {"a/b.txt"} == {f"a/{n}" for n in names(paths=[f"{memory}/a"])}
    limited = list(text_documents(TextFilesConfig(paths=[corpus], max_bytes=1000), 0))
    assert limited == list(text_documents(TextFilesConfig(paths=[corpus]), 0))[: len(limited)]
    assert sum(len(text.encode()) for _, text in limited) <= 1000


def test_equal_names_in_several_places_are_documents_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b", "b/below"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part-0.txt").write_text(f"of {folder}")

    def texts(*paths: str) -> list[str]:
        config = TextFilesConfig(paths=[f"{tmp_path}/{path}" for path in paths])
        return sorted(text for _, text in text_documents(config, 0))

    assert texts("a", "b") == ["of a", "of b", "of b/below"]
    assert texts("a/part-0.txt", "b/part-0.txt") == ["of a", "of b"]
    assert texts("b", "b/below", "b/part-0.txt") == ["of b", "of b/below"]  # each file once


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_shards_are_those_of_the_whole_and_workers_get_what_was_found_out(
    corpus: str, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tokenizer == "bpe":
        need_tokenizers()
    monkeypatch.setattr(text_files, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(text_files, "SOME", 3)
    config = TextFilesConfig(paths=[corpus], tokenizer=tokenizer, vocab_size=300)
    generator = TextFiles(config, 0, 128)
    spec, digest = generator.specs()["tokens"], generator.source()["tokens_sha256"]
    worker = pickle.loads(pickle.dumps(generator))
    monkeypatch.setattr(text_files, "_listed", None)  # neither reads the corpus through nor trains again
    monkeypatch.setattr(Bpe, "train", None)
    shards = [worker.values("tokens", k) for k in range(spec.shards)]
    assert spec.shards > 10 and [len(shard) for shard in shards] == [spec.shard_extent(k) for k in range(spec.shards)]
    assert hashlib.sha256(np.concatenate(shards).data).hexdigest() == digest == worker.source()["tokens_sha256"]
    assert worker.attributes() == generator.attributes()


def test_memory_is_that_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "0123456789abcdef" * 4096
    for i in range(200):  # 13 MB
        (tmp_path / f"{i}.txt").write_text(line)
    monkeypatch.setattr(text_files, "SOME_BYTES", 2**18)
    generator = TextFiles(TextFilesConfig(paths=[str(tmp_path)]), 0, 2**18)
    tracemalloc.start()
    try:
        generator.source()
        for k in range(generator.specs()["tokens"].shards):
            generator.values("tokens", k)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_a_long_document_is_read_once_for_all_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("0123456789abcdef" * 100)
    monkeypatch.setattr(text_files, "CHUNK_TOKENS", 64)
    generator = TextFiles(TextFilesConfig(paths=[str(tmp_path)], validation=0, test=0), 0, 64)
    assert generator.specs()["tokens"].shards == 26
    read, real = [], Document.text
    monkeypatch.setattr(Document, "text", lambda self: read.append(self) or real(self))
    shards = [generator.values("tokens", k) for k in [*range(26), 3]]
    assert bytes(np.concatenate(shards[:-1])) == b"0123456789abcdef" * 100 + b"\0"
    assert len(read) == 1 and (shards[-1] == shards[3]).all()


def test_a_file_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    generator = TextFiles(TextFilesConfig(paths=[str(path)], validation=0, test=0), 0, 2**20)
    generator.source()
    path.write_text("behind")
    with pytest.raises(DataError, match=r"a\.txt: changed while the data set was being made"):
        generator.values("tokens", 0)


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
