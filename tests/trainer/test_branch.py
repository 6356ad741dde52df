"""Runs that branch off from another one with all of its state."""

from typing import Any

import pytest

from datamodules.store import Store
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import fno_config, tiny_fields
from trainer import config as configs
from trainer.checkpoint import CheckpointError, loading, read_manifest
from trainer.config import ConfigError
from trainer.lifecycle import prepare_new, prepare_resume
from trainer.records import read_attempts, read_metrics, read_record
from trainer.run import fit

LONG = [
    "strategy.name=ddp",
    "data.threads=1",
    "train.ema_decay=0.5",
    "schedule.warmup_steps=2",
    "checkpoint.every=3",
    "train.val_every=3",
]


def run(url: str, data: str, *overrides: str) -> str:
    prepare_new(configs.load(fno_config(url, data, max_steps=9), [*LONG, *overrides]))
    fit(configs.load(f"{url}/config.yaml"))
    return url


def rows(url: str) -> dict[int, tuple[float, float]]:
    """Step -> (loss, rate)."""
    return {row["step"]: (row["loss"], row["lr"]) for row in read_metrics(Store(url)) if "loss" in row}


def branches(folder: str, data: str) -> dict[str, Any]:
    """Worker: a run of nine steps; one that goes on as it did from its sixth, one at a third of the rate and with decay."""
    whole = run(f"{folder}/whole", data, "checkpoint.keep_last=9")
    from_six = (f"weights.url={whole}", "weights.step=6", "weights.state=true")
    same = run(f"{folder}/same", data, *from_six)
    other = run(f"{folder}/other", data, *from_six, "optim.lr=1e-3", "optim.weight_decay=0.5", "train.max_steps=12")
    longer = run(f"{folder}/longer", data, f"weights.url={same}", "weights.state=true", "train.max_steps=12")
    fit(prepare_resume(longer, ["train.max_steps=14"]), resume=True)
    found: dict[str, Any] = {name: rows(f"{folder}/{name}") for name in ("whole", "same", "other", "longer")}
    found["validated"] = [row["step"] for row in read_metrics(Store(same)) if "val/loss" in row]
    found["attempts"] = read_attempts(Store(longer))
    found["records"] = {name: read_record(Store(f"{folder}/{name}")) for name in ("same", "other", "longer")}
    store = Store(other).sub("checkpoints")
    manifest = read_manifest(store, 12)
    found["decay"] = {v for k, v in manifest["scalars"].items() if k.endswith(".weight_decay")}
    (scheduler,) = loading.unpack(loading.read_state(store.sub("step-00000012"), manifest))["lr_schedulers"]
    found["base"] = scheduler["base_lrs"]
    for wrong in ("train.global_batch=8", "train.max_steps=6"):
        with pytest.raises(CheckpointError) as error:
            run(f"{folder}/{wrong}", data, *from_six, wrong)
        found[wrong] = str(error.value)
    return found


def test_branches_go_on_from_another_run_with_all_of_its_state(tmp_path):
    (found,) = run_distributed(branches, 1, str(tmp_path), tiny_fields(str(tmp_path / "fields")))
    whole, same, other = found["whole"], found["same"], found["other"]
    assert sorted(whole) == list(range(1, 10)) and same == {step: whole[step] for step in (7, 8, 9)}  # bit for bit
    assert found["validated"] == [9]  # step 6 is the parent's
    rate = fno_config("", "")["optim"]["lr"]
    assert sorted(other) == list(range(7, 13)) and other[7][0] == whole[7][0] and other[8][0] != whole[8][0]
    assert set(found["base"]) == {1e-3} and found["decay"] == {0.0, 0.5}
    assert other[7][1] / 1e-3 != pytest.approx(whole[7][1] / rate)  # the same place of a longer schedule
    assert other[12][1] < other[7][1] <= 1e-3
    assert sorted(found["longer"]) == list(range(10, 15))
    assert [attempt["resumed_from"] for attempt in found["attempts"]] == [9, 12]
    assert {name: record["steps"] for name, record in found["records"].items()} == {
        "same": 9,
        "other": 12,
        "longer": 14,
    }
    assert "was trained with train.global_batch=4, not 8" in found["train.global_batch=8"]
    assert "from step 6 of" in found["train.max_steps=6"] and "train.max_steps=6" in found["train.max_steps=6"]


def test_what_a_branch_cannot_have(tmp_path):
    data = tiny_fields(str(tmp_path / "fields"))
    for wrong, message in (
        ("weights.state=true", "no effect without url"),
        ("weights.state=true weights.url=a.safetensors", "is a file"),
        ("weights.state=true weights.url=a weights.strict=false", "leave out ema, map and strict"),
    ):
        with pytest.raises(ConfigError, match=message):
            configs.load(fno_config(str(tmp_path / "run"), data), wrong.split())
