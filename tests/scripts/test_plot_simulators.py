"""The page of the simulators shows all of them and says what the code says."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_simulators", ROOT / "scripts" / "plot_simulators.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_simulator_has_a_section_and_its_pictures(script):
    page, pictures = (DOCS / "simulators.md").read_text(), script.samples()
    assert {config["name"] for config in pictures.values()} == set(script.simulators()) == set(script.TESTED)
    for name in script.simulators():
        assert f"\n## {name}\n" in page
    for picture in pictures:
        path = DOCS / "simulators" / f"{picture}.png"
        assert f"(simulators/{picture}.png)" in page
        assert path.stat().st_size <= script.MOST_BYTES
        assert Image.open(path).width > 200
    assert {path.stem for path in (DOCS / "simulators").iterdir()} == set(pictures)


def test_the_page_is_what_the_script_writes(script):
    """If this fails: python scripts/plot_simulators.py"""
    assert (DOCS / "simulators.md").read_text() == script.page()


def test_a_picture_is_drawn(script, tmp_path):
    script.main(["advection_1d", "--out", str(tmp_path)])
    drawn = (tmp_path / "simulators" / "advection_1d.png").read_bytes()
    assert Image.open(io.BytesIO(drawn)).size == Image.open(DOCS / "simulators" / "advection_1d.png").size
    assert (tmp_path / "simulators.md").exists()
    with pytest.raises(SystemExit, match="advektion: no such picture; known: advection_1d, "):
        script.main(["advektion", "--out", str(tmp_path)])
