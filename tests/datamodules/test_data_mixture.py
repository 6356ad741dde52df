"""The mixture as a run's config names it, and a run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.mixture import MixtureConfig
from trainer import config as configs
from trainer.run import fit

from .samples import write_fields

RUN = str(Path(__file__).parents[2] / "configs/runs/mixed_fno.yaml")
SMALL = [
    "task.space=[4,4]", "task.channels=2", "model.in_channels=2", "model.out_channels=2", "model.modes=[2,2]", "model.width=4", "model.depth=1", "train.max_steps=4",
    "task.eval_rollout_steps=2", "train.global_batch=8", "train.val_every=0", "checkpoint.every=2", "schedule.warmup_steps=1",
    "resources.processes_per_node=1", "resources.threads=1", "log.progress=false", "strategy.name=ddp",
]  # fmt: skip


def test_the_shipped_config_is_a_mixture() -> None:
    config = configs.load(RUN)
    assert isinstance(config.data, MixtureConfig)
    assert [config.data.source(i)[1] for i in range(2)] == [3.0, 1.0]
    assert all(Path(source["url"]).is_absolute() for source in config.data.sources)
    with pytest.raises(ValueError, match=r"sources\[0\].frame: no such field"):
        configs.load(RUN, ["data.sources=[{url: a, frame: 2}]"])


def test_a_run_on_a_mixture(tmp_path: Path) -> None:
    urls = [str(tmp_path / name) for name in "ab"]
    for url in urls:
        write_fields(url, channels=2)
    sources = f"data.sources=[{{url: {urls[0]}, weight: 3}}, {{url: {urls[1]}}}]"
    record = fit(configs.load(RUN, [*SMALL, sources, f"url={tmp_path}/run"]))
    assert record["status"] == "ok" and record["samples"] == 32
