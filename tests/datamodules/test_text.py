"""The standard library as bytes."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.format import DataError
from datamodules.text import StdlibText, StdlibTextConfig, stdlib_documents


@pytest.fixture
def library(tmp_path) -> str:
    files = {f"m{i}.py": bytes([65 + i]) * (20 + i) for i in range(20)}
    files |= {"pkg/a.py": b"# a", "pkg/test/t.py": b"no", "site-packages/x.py": b"no", "data.txt": b"no"}
    files |= {"empty.py": b"", "zero.py": b"a\0b"}
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(tmp_path)


def test_documents_are_the_librarys_own_source(library):
    found = dict(stdlib_documents(0, 0, library))
    assert sorted(found) == sorted([*(f"m{i}.py" for i in range(20)), "pkg/a.py"])
    assert found["pkg/a.py"] == b"# a"


def test_order_depends_on_names_and_seed_alone(library):
    first = stdlib_documents(0, 0, library)
    assert first == stdlib_documents(0, 0, library) != stdlib_documents(1, 0, library)
    assert sorted(first) == sorted(stdlib_documents(1, 0, library))
    assert [name for name, _ in first] != sorted(name for name, _ in first)


def test_limit_takes_whole_documents_from_the_front(library):
    every = stdlib_documents(0, 0, library)
    some = stdlib_documents(0, 200, library)
    assert some == every[: len(some)] and 100 < sum(len(c) + 1 for _, c in some) <= 200
    assert stdlib_documents(0, 5, library) == [(every[0][0], every[0][1][:4])]


def test_no_sources_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.py files"):
        stdlib_documents(0, 0, str(tmp_path))


def test_tokens_of_this_python():
    generator = StdlibText(StdlibTextConfig(max_bytes=600_000, validation=0.1, test=0.1), seed=0, shard_bytes=200_000)
    spec, attributes = generator.specs()["tokens"], generator.attributes()
    tokens = np.concatenate([generator.values("tokens", k) for k in range(spec.shards)])
    assert tokens.dtype == np.uint8 and tokens.shape == spec.shape and 400_000 < tokens.size <= 600_000
    assert spec.shard_length == 3 * 65536 and spec.shards == -(-tokens.size // spec.shard_length)
    documents = bytes(tokens).split(b"\0")
    assert documents.pop() == b"" and len(documents) == attributes["documents"]
    assert sum(b"import " in document for document in documents) > len(documents) / 2
    splits = attributes["splits"]
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"][0] == 0 and splits["test"][1] == tokens.size
    for before, after in (("train", "validation"), ("validation", "test")):
        cut = splits[before][1]
        assert cut == splits[after][0] and tokens[cut - 1] == 0
    assert 0.6 < splits["train"][1] / tokens.size < 0.95
    assert generator.source() == StdlibText(generator.config, 0, 1).source()


@pytest.mark.parametrize("change", [{"max_bytes": -1}, {"validation": -0.1}, {"validation": 0.5, "test": 0.5}])
def test_impossible_configs_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        StdlibTextConfig(**change)
