"""Where the published tables lie that some tests are checked against; they are no part of this repository."""

import os
from pathlib import Path

from tests.conftest import unavailable

_PLACE = Path(os.environ.get("KEEL_REFERENCE_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def table(name: str) -> str:
    """Path of a reference table; the test is reported as missing it where it is not there."""
    path = _PLACE / name
    if not path.is_file():
        unavailable(f"no reference table {name}: set KEEL_REFERENCE_DATA to the folder that holds it")
    return str(path)
