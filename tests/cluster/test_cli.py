"""The command line: help, mistakes, and the commands that need no training."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from tests.cluster.synthetic import operator_run

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = str(ROOT / "configs/runs/demo_fno.yaml")
TINY = str(ROOT / "configs/data/tiny_navier_stokes_2d.yaml")


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every sub-command that can be called, with its words."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        return [(words, parser)]
    return [
        leaf for action in nested for name, child in action.choices.items() for leaf in leaves(child, (*words, name))
    ]


LEAVES = leaves(cli.build_parser())


@pytest.mark.parametrize(("words", "parser"), LEAVES, ids=[" ".join(words) for words, _ in LEAVES])
def test_help_of_every_command_is_complete(words: tuple[str, ...], parser: argparse.ArgumentParser) -> None:
    assert parser.description
    assert parser.epilog and f"keel {' '.join(words)}" in parser.epilog
    assert all(action.help for action in parser._actions)
    assert callable(parser.get_default("handler"))
    for line in parser.epilog.splitlines()[1:]:
        cli.parse(line.split()[1:])


def test_all_commands_are_there() -> None:
    assert {" ".join(words) for words, _ in LEAVES} == {
        "train", "submit", "resume", "evaluate", "report", "status", "logs", "cancel", "ls", "top", "doctor",
        "data make", "data import", "data check", "data show", "data stats", "data copy", "config show", "dryrun",
        "coordcheck", "fit", "plan", "score", "sweep plan", "sweep run", "sweep status",
        "checkpoint ls", "checkpoint show", "checkpoint verify", "checkpoint export", "checkpoint prune", "checkpoint diff",
    }  # fmt: skip


def test_help_needs_no_torch() -> None:
    code = "import sys; from cluster import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.endswith("False\n")
    assert "evaluate" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("keel 0.")


def test_overrides_may_stand_around_options() -> None:
    args = cli.parse(["data", "make", "c.yaml", "a=1", "--workers", "2", "b.c=-3"])
    assert (args.overrides, args.workers) == (["a=1", "b.c=-3"], 2)


@pytest.mark.parametrize(
    "words",
    [
        ["trian"],
        [],
        ["data"],
        ["train"],
        ["evaluate", "url", "--splt=test"],
        ["report", "url", "a=b"],
        ["data", "make", "c", "--workers", "2", "loose"],
    ],
)
def test_a_mistyped_line_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config", "show", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["config", "show", CONFIG, "model.widht=3"], "did you mean 'model.width'?"),
        (["config", "show", CONFIG, "train.max_steps"], "is not of the form key=value"),
        (["train", CONFIG, "resources.nodes=2", "train.global_batch=8"], "resources.nodes=2"),
        (["resume", "{tmp}/nothing"], "no run at"),
        (["evaluate", "{tmp}/nothing"], "no run at"),
        (["report", "{tmp}/nothing"], "no run at"),
        (["checkpoint", "ls", "{tmp}/nothing"], "no run at"),
        (["data", "check", "{tmp}/nothing"], "not a Keel data set"),
        (["data", "show", "{tmp}/nothing"], "not a Keel data set"),
        (["data", "make", "nowhere.yaml"], "nowhere.yaml"),
        (["data", "make", TINY, "generator.name=weather"], "weather"),
    ],
)
def test_a_users_error_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main([word.replace("{tmp}", str(tmp_path)) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("keel: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("config.yaml"))


def test_traceback_on_request_and_for_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no config file"):
        cli.main(["config", "show", "nowhere.yaml"])
    assert not cli.is_user_error(RuntimeError("a defect"))
    from trainer.checkpoint import CheckpointError

    assert cli.is_user_error(CheckpointError("damaged"))


def test_config_show_prints_what_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.config import load, to_dict

    assert cli.main(["config", "show", CONFIG, "train.max_steps=77", "schedule.warmup_steps=7"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# hash: ")
    (tmp_path / "shown.yaml").write_text(text)
    shown = load(str(tmp_path / "shown.yaml"))
    assert to_dict(shown) == to_dict(load(CONFIG, ["train.max_steps=77", "schedule.warmup_steps=7"]))
    assert shown.train.max_steps == 77


def test_data_make_check_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "tiny")
    assert cli.main(["data", "make", TINY, f"url={url}", "--workers", "0"]) == 0
    assert capsys.readouterr().out == f"{url}\n"
    assert cli.main(["data", "check", url]) == 0
    assert "whole" in capsys.readouterr().out
    assert cli.main(["data", "show", url]) == 0
    shown = capsys.readouterr().out
    assert "fingerprint" in shown and "vorticity" in shown and "validation" in shown

    shard = next(path for path in (tmp_path / "tiny" / "fields" / "c").rglob("*") if path.is_file())
    damaged = bytearray(shard.read_bytes())
    damaged[10] ^= 1
    shard.write_bytes(damaged)
    assert cli.main(["data", "check", url]) == 1
    problems = capsys.readouterr().out
    assert str(shard) in problems and "1 problems" in problems
    assert cli.main(["data", "check", url, "--shallow"]) == 0


def test_train_refuses_a_url_that_holds_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    operator_run(str(tmp_path / "run"))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert cli.main(["train", CONFIG, f"url={tmp_path}/run"]) == 2
    assert f"keel resume {tmp_path}/run" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_checkpoint_commands_on_a_run_without_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    operator_run(str(tmp_path / "run"))
    assert cli.main(["checkpoint", "ls", f"{tmp_path}/run"]) == 0
    assert cli.main(["checkpoint", "verify", f"{tmp_path}/run"]) == 1
    assert "no committed checkpoint" in capsys.readouterr().out


def test_report_prints_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    operator_run(str(tmp_path / "run"))
    assert cli.main(["report", f"{tmp_path}/run"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run/report.html\n"
    assert cli.main(["report", f"{tmp_path}/run", "--out", f"{tmp_path}/copy.html"]) == 0
    assert (tmp_path / "copy.html").read_bytes() == (tmp_path / "run" / "report.html").read_bytes()
