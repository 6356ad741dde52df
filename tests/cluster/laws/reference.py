"""Where the published tables lie that some tests are checked against; they are no part of this repository."""

import os
from pathlib import Path

FOLDER = Path(os.environ.get("KEEL_REFERENCE_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def table(name: str) -> str:
    """Path of a reference table."""
    return str(FOLDER / name)
