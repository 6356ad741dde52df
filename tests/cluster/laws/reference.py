"""Where the published tables lie that some tests are checked against; they are no part of this repository."""

import os
from pathlib import Path

import pytest

_PLACE = Path(os.environ.get("KEEL_REFERENCE_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def table(name: str) -> str:
    """Path of a reference table. Where it is not there the test is skipped, also where all others are required: the tables
    are other people's, and what needs none of them is checked by `keel fit --selftest`."""
    path = _PLACE / name
    if not path.is_file():
        pytest.skip(f"no reference table {name}: set KEEL_REFERENCE_DATA to the folder that holds it")
    return str(path)
