"""Configs: strict, with one clear line for each mistake; what is printed loads back to the same."""

import pytest

from modules.tasks.field_rollout import FieldRollout
from tests.helpers.runs import fno_config, lm_config
from trainer import config as configs
from trainer.config import ConfigError


def base() -> dict:
    return fno_config("/tmp/run", "s3://bucket/data")


def test_defaults_sections_and_overrides():
    config = configs.load(base(), ["model.width=24", "optim.betas=[0.8,0.9]", "train.grad_clip=0.5"])
    assert config.model.name == "fno" and config.model.width == 24 and config.model.modes == [6, 6]
    assert config.optim.betas == [0.8, 0.9] and config.train.grad_clip == 0.5
    assert config.parametrization.name == "standard" and config.schedule.min_lr_ratio == 0.1


def test_what_is_printed_loads_back(tmp_path):
    config = configs.load(lm_config("/tmp/run", "/tmp/data"))
    path = tmp_path / "config.yaml"
    path.write_text(configs.to_yaml(config))
    again = configs.load(str(path))
    assert configs.to_dict(again) == configs.to_dict(config)
    assert configs.config_hash(again) == configs.config_hash(config)


def test_the_hash_is_of_what_decides_the_numbers():
    one = configs.config_hash(configs.load(base()))
    assert one == configs.config_hash(
        configs.load(base(), ["url=/elsewhere", "resources.processes_per_node=2", "log.every=1"])
    )
    watched = ["recovery.max_restarts=3", "recovery.step_timeout_seconds=5", "recovery.init_timeout_seconds=9"]
    assert one == configs.config_hash(configs.load(base(), [*watched, "train.val_every=2"]))
    averaged = ["train.ema_decay=0.5", "train.val_every=2"]
    assert configs.config_hash(configs.load(base(), averaged)) == configs.config_hash(
        configs.load(base(), [*averaged, "train.ema_validation=true"])
    )
    moved = configs.load(base(), ["data.url=/moved"])
    assert one == configs.config_hash(moved) != configs.config_hash(moved, "another data set")
    for override in ("seed=8", "model.width=10", "optim.lr=1e-5", "train.max_steps=9", "recovery.nonfinite=skip"):
        assert one != configs.config_hash(configs.load(base(), [override]))


def test_replicas_are_compared_only_where_there_may_be_some():
    two = ["recovery.parity_every=2", "resources.processes_per_node=2"]
    for strategy in (["name=ddp"], ["name=fsdp", "replicate=2"]):
        configs.load(base(), [*two, *(f"strategy.{value}" for value in strategy)])
    configs.load(base(), ["recovery.parity_every=2", "strategy.name=ddp"])  # on one process: there may be more


@pytest.mark.parametrize("saved", [["every=0", "every_minutes=5"], ["every=0", "keep_every=2"], ["keep_last=3"]])
def test_whatever_makes_commits_makes_rollbacks_possible(saved):
    commits = 3 if saved == ["keep_last=3"] else 2
    rollback = ["recovery.nonfinite=rollback", f"recovery.rollback_commits={commits}"]
    assert configs.load(base(), [*rollback, *(f"checkpoint.{value}" for value in saved)])


def test_relative_urls_become_absolute_and_remote_ones_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = configs.load(base(), ["url=runs/a"])
    assert config.url == str(tmp_path / "runs/a") and config.data.url == "s3://bucket/data"


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (
            fno_config,
            "data.pairs=true",
            "data.pairs=true: makes the batch entry 'lead', which task field_rollout does not",
        ),
        (fno_config, "data.parameters=[nu]", r"data.parameters=\['nu'\]: makes the batch entry 'nu'"),
        (fno_config, "data.input_frames=1", "data.input_frames=1: makes the batch entry 'input'"),
        (
            lm_config,
            "data.documents=true",
            "data.documents=true: makes the batch entry 'document', which task next_token",
        ),
    ],
)
def test_data_that_the_task_does_not_read_are_refused(kind, override, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(kind("/tmp/run", "/tmp/data"), [override])


def test_data_without_what_the_task_needs_are_refused(monkeypatch):
    monkeypatch.setattr(FieldRollout, "reads", ("fields", "lead"))
    with pytest.raises(
        ConfigError, match=r"task field_rollout: needs the batch entry 'lead', but data.name=fields makes"
    ):
        configs.load(base())
    assert configs.load(base(), ["data.pairs=true"]).data.pairs


def test_sources_of_a_mixture_are_held_to_the_task():
    sources = [{"url": "/a"}, {"url": "/b", "pairs": True}]
    with pytest.raises(ConfigError, match=r"data.sources\[1\].pairs=true: makes the batch entry 'lead'"):
        configs.load(base() | {"data": {"name": "mixture", "sources": sources}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_step=3"], "unknown key 'train.max_step': did you mean 'train.max_steps'?"),
        (["model.widht=3"], "unknown key 'model.widht': did you mean 'model.width'?"),
        (["modle.width=3"], "unknown key 'modle': did you mean 'model'?"),
        (["model.width=wide"], "model.width='wide': expected int, got str"),
        (["train.max_steps=1.5"], "train.max_steps=1.5: expected int, got float"),
        (["model.modes=[6,x]"], "model.modes"),
        (["train=3"], "train=3: expected a section"),
        (["model.name=fmo"], "did you mean fno"),
        (["optim.name=adamv"], "optim.name=adamv: no such optim; did you mean adamw?"),
        (["strategy.name=zero"], "strategy.name=zero: no such strategy; known: ddp, deepspeed, fsdp"),
        (["train.global_batch=5", "resources.processes_per_node=2"], "nearest valid: 4 or 6"),
        (["train.global_batch=8", "train.micro_batch=3"], "train.micro_batch=3 does not divide the 8 samples"),
        (["schedule.warmup_steps=99"], "exceed train.max_steps=8"),
        (["schedule.name=wsd"], "needs decay_steps"),
        (["schedule.decay_steps=2"], "decay_steps=2 has no effect with name=cosine"),
        (["checkpoint.keep_last=1"], "at least 2 are kept"),
        (["checkpoint.keep_every=3"], "multiple of every=4"),
        (["recovery.parity_every=2"], "recovery.parity_every=2 has no effect: with strategy.name=fsdp"),
        (["recovery.spike=rollback", "checkpoint.every=0"], "there would be no commit to go back to"),
        (["recovery.spike=rollback", "recovery.rollback_commits=3"], "exceeds checkpoint.keep_last=2"),
        (["diagnostics.names=[gradient]"], "diagnostics: names=gradient: must be one of"),
        (["diagnostics.every=0"], "every=0"),
        (["optim.lr=-1"], "optim: lr=-1.0: must be greater than 0"),
        (["optim.name=sgd", "optim.nesterov=true"], "optim: nesterov=true needs momentum > 0"),
        (["train.precision=fp8"], "must be one of 32-true"),
        (["novalue"], "not of the form key=value"),
        (["model.modes=[6]"], "need dimensions=2"),
        (["task.channels=2"], "need in_channels=2"),
        (["data.frames=7"], "data.frames=7: the task reads 2; leave it out"),
        (["diagnostics.names=[logits]"], "logits"),
        (["optim.weight_decay=-1"], "optim: weight_decay=-1.0: must be at least 0"),
        (["optim.lr=.inf"], "optim: lr=inf"),
        (["train.grad_clip=.nan"], "train: grad_clip=nan"),
        (["log.flush_seconds=0"], "log: flush_seconds=0.0: must be greater than 0"),
        (["seed=-1"], "seed=-1: must be at least 0"),
    ],
)
def test_every_mistake_is_one_clear_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        configs.load(base(), overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["url", "model", "task", "data"])
def test_what_is_required_is_named(key):
    raw = base()
    del raw[key]
    with pytest.raises(ConfigError, match=f"{key} is required|{key}.* is required"):
        configs.load(raw)


def test_a_required_value_inside_a_section_is_named():
    raw = base()
    del raw["data"]["url"]
    with pytest.raises(ConfigError, match=r"data.*url"):
        configs.load(raw)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="no config file at"):
        configs.load(str(tmp_path / "absent.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        configs.load(str(tmp_path / "list.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        configs.load(str(tmp_path / "bad.yaml"))
