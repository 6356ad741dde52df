"""Where the published tables lie that some tests are checked against; they are no part of this repository."""

import os
from pathlib import Path

FOLDER = Path(os.environ.get("KEEL_REFERENCE_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
TESTS = Path(__file__).resolve().with_name("test_reference.py")


def missing(asked: list[str]) -> str:
    """What is not run of the tests that were asked for (paths, or ids of tests), in a line; empty: nothing."""
    paths = [Path(word.partition("::")[0]).resolve() for word in asked]
    if FOLDER.is_dir() or not any(TESTS.is_relative_to(path) for path in paths):
        return ""
    shown = TESTS.relative_to(TESTS.parents[3])
    return f"not run: {shown}, as the published tables are not at {FOLDER} (KEEL_REFERENCE_DATA says where they are)"


def table(name: str) -> str:
    """Path of a reference table."""
    return str(FOLDER / name)
