"""The README tells the truth: its commands parse, its make targets exist, the paths it names are there."""

import re
import shlex
from pathlib import Path

import pytest

from cluster import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:bash|sh)\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
KEEL = [line for line in LINES if line.startswith("keel ")]
MAKE = [line for line in LINES if line.startswith("make ")]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


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


@pytest.mark.parametrize("line", MAKE)
def test_make_target_exists(line: str) -> None:
    words = [word for word in shlex.split(line)[1:] if "=" not in word]
    assert words
    assert set(words) <= targets()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_linked_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:trainer|modules|datamodules|cluster|configs|scripts)/[\w./]*)`", README)))
)
def test_named_path_exists(path: str) -> None:
    assert (ROOT / path).exists()
