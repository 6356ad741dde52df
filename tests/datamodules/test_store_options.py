"""Options of the store reach a stream from its config, also that of one source of a mixture."""

from __future__ import annotations

import pytest

from datamodules.data import FieldsConfig, FieldsData, TextConfig
from datamodules.loader import StreamingDataset
from datamodules.mixture import MixtureConfig, MixtureData
from trainer import config as configs

from .samples import write_fields
from .test_data_mixture import RUN


def test_a_stream_and_its_samples(memory: str) -> None:
    write_fields(memory)
    data = FieldsData(FieldsConfig(url=memory, store={"deadline": 7}), global_batch=2)
    assert data.dataset.store.retry.deadline == 7 and data.spec()["samples"] == 8 * 6
    stream = StreamingDataset(memory, global_batch=2, frames=3, store={"deadline": 9, "connect_deadline": 3})
    assert next(iter(stream))["fields"].shape[:2] == (2, 3)
    stream.close()
    retry = stream._data.dataset.store.retry
    assert (retry.deadline, retry.connect_deadline) == (9, 3)


def test_each_source_of_a_mixture_has_its_own(memory: str, tmp_path) -> None:
    write_fields(memory)
    write_fields(str(tmp_path))
    sources = [{"url": memory, "store": {"deadline": 5}}, {"url": str(tmp_path)}]
    data = MixtureData(MixtureConfig(sources=sources), global_batch=2)
    assert [source.dataset.store.options for source in data.sources] == [{"deadline": 5}, {}]


def test_options_are_access_and_do_not_name_another_run() -> None:
    assert "store" in FieldsConfig.not_hashed and "store" in TextConfig.not_hashed
    config = configs.load(
        RUN.replace("mixed", "demo"), ["data.store.endpoint_url=http://host:1", "data.store.anon=true"]
    )
    assert config.data.store == {"endpoint_url": "http://host:1", "anon": True}
    with pytest.raises(ValueError, match=r"data\.stores.*did you mean .data\.store"):
        configs.load(RUN.replace("mixed", "demo"), ["data.stores.anon=true"])
