"""Who may import whom: cluster -> trainer -> modules, datamodules; the last two know nothing of Keel but themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "modules": {"modules"},
    "datamodules": {"datamodules"},
    "trainer": {"trainer", "modules", "datamodules"},
    "cluster": {"cluster", "trainer", "modules", "datamodules"},
}


def imported(source: str) -> set[str]:
    """Top-level names of all absolute imports, wherever they stand in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("layer", ALLOWED)
def test_layer_imports_only_what_lies_below(layer: str) -> None:
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path.read_text()) & ALLOWED.keys() - ALLOWED[layer]
    ]
    assert not wrong


def test_the_check_sees_every_form_of_import() -> None:
    assert imported("import trainer.run\ndef f():\n    from cluster import cli\nfrom . import x") == {
        "trainer",
        "cluster",
    }


@pytest.mark.parametrize("layer", ALLOWED)
def test_no_file_grows_beyond_400_lines(layer: str) -> None:
    long = [
        str(path.relative_to(ROOT)) for path in (ROOT / layer).rglob("*.py") if len(path.read_text().splitlines()) > 400
    ]
    assert not long
