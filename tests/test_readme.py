"""The README and docs/clusters.md tell the truth: their commands parse, their make targets exist, the paths they name are
there, their configs load, and the messages that they explain are those of the code."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from cluster import cli
from cluster.launch import code
from cluster.launch.cluster_config import load
from trainer import build
from trainer import config as configs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CLUSTERS = (ROOT / "docs/clusters.md").read_text()


def lines(text: str) -> list[str]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


LINES = lines(README) + lines(CLUSTERS)
KEEL = [line.split(" | ")[0] for line in LINES if line.startswith("keel ")]
MAKE = [line for line in LINES if line.startswith("make ")]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_readme_shows_commands() -> None:
    assert len(KEEL) >= 8
    assert len(MAKE) >= 2


@pytest.mark.parametrize("line", KEEL)
def test_keel_command_parses_and_names_real_configs(line: str) -> None:
    words = shlex.split(line)[1:]
    args = cli.parse(words)
    assert callable(args.handler)
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"


@pytest.mark.parametrize("line", [line for line in KEEL if line.startswith(("keel train configs/", "keel dryrun "))])
def test_a_run_that_is_shown_is_not_refused(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is checked before anything starts, but for the data."""
    monkeypatch.chdir(ROOT)
    args = cli.parse(shlex.split(line)[1:])
    build.check(configs.load(args.config, args.overrides))


@pytest.mark.parametrize("line", [line for line in KEEL if line.startswith("keel submit ")])
def test_a_job_that_is_shown_can_be_rendered(line: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(code, "pack", lambda root: b"the working tree")
    assert cli.main([*shlex.split(line)[1:], "--dry-run"]) == 0, capsys.readouterr().err
    assert "cluster.launch." in capsys.readouterr().out


@pytest.mark.parametrize("line", MAKE)
def test_make_target_exists(line: str) -> None:
    words = [word for word in shlex.split(line)[1:] if "=" not in word]
    assert words
    assert set(words) <= targets()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_linked_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_links_within_a_page_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", CLUSTERS, flags=re.MULTILINE)
    places = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", CLUSTERS)) <= places


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"`((?:trainer|modules|datamodules|cluster|configs|scripts)/[\w./]*)`", README + CLUSTERS))),
)
def test_named_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_scripts_can_be_started_as_shown() -> None:
    shown = re.findall(r"(python )?(scripts/[\w./]+\.(?:py|sh))", "\n".join(LINES) + README + CLUSTERS)
    assert shown
    for python, path in shown:
        assert (ROOT / path).is_file() and (python or os.access(ROOT / path, os.X_OK)), path


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(backend:.*?)```", CLUSTERS, flags=re.DOTALL))
def test_a_cluster_that_is_shown_can_be_loaded(text: str) -> None:
    load(yaml.safe_load(text))


def test_explained_messages_are_those_of_the_code() -> None:
    _, _, table = CLUSTERS.partition("| you see |")
    cells = [line.split(" | ")[0] for line in table.splitlines()[2:] if line.startswith("| `")]
    messages = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    sources = "".join(
        path.read_text() for folder in ("cluster", "datamodules", "trainer") for path in (ROOT / folder).rglob("*.py")
    )
    assert len(messages) > 20
    filled = {
        "nodes=3: partition main has 2": ": partition {partition} has ",
        "nodes=2: needs 2 nodes with 8 GPUs, the cluster has 1": ": needs {plan.nodes} nodes{kind}, the cluster has ",
    }
    for message in messages:
        assert filled.get(message, message) in sources, message
