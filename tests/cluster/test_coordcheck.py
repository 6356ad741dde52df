"""`keel coordcheck`: the standard parametrisation fails, muP passes, on tiny models of both kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.coordinates import OUTPUT, Axis, _slopes, default_axes
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text
from trainer.config import load

MUP = {
    "lm": ["parametrization.name=mup+depth", "parametrization.base={width: 16, depth: 2}"],
    "fno": ["parametrization.name=mup", "parametrization.base.width=8"],
}
AXES = {"lm": ["--widths", "16,32,64", "--depths", "2,4,8"], "fno": ["--widths", "8,16,32"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Configs by kind."""
    folder = tmp_path_factory.mktemp("coordcheck")
    found = {}
    for kind, make, config in (("lm", tiny_text, lm_config), ("fno", tiny_fields, fno_config)):
        raw = config(str(folder / "run"), make(str(folder / kind)), global_batch=4)
        raw |= {"optim": {"name": "adamw", "lr": 4e-3}, "schedule": {"name": "cosine", "warmup_steps": 5}}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(raw))
        found[kind] = str(folder / f"{kind}.yaml")
    return found


def run(file: str, out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["coordcheck", file, "--seeds", "2", "--steps", "3", "--out", str(out), *words])
    assert b"<svg" in (out / "coordcheck.html").read_bytes()
    return code, json.loads((out / "coordcheck.json").read_text())


def output_change(found: dict[str, Any], axis: str, step: int) -> float:
    slopes = found["axes"][axis]["slopes"]
    return next(s["exponent"] for s in slopes if (s["site"], s["quantity"], s["step"]) == (OUTPUT, "change", step))


@pytest.mark.parametrize("kind", ["lm", "fno"])
def test_the_standard_parametrisation_fails_and_mup_passes(kind, files, tmp_path, capsys):
    code, standard = run(files[kind], tmp_path / "sp", *AXES[kind])
    printed = capsys.readouterr().out
    assert code == 1 and "FAIL" in printed and not standard["ok"]
    assert not any(axis["ok"] for axis in standard["axes"].values())
    code, mup = run(files[kind], tmp_path / "mup", *AXES[kind], *MUP[kind])
    printed = capsys.readouterr().out
    assert code == 0 and "FAIL" not in printed and mup["ok"], printed
    assert output_change(standard, "width", 1) > 0.5 > 0.3 > abs(output_change(mup, "width", 1))


def test_modes_and_resolution_keep_the_sizes_of_an_fno(files, tmp_path):
    code, found = run(files["fno"], tmp_path / "grid", "--modes", "6,8,12", "--resolutions", "8,16", *MUP["fno"])
    assert code == 0 and list(found["axes"]) == ["modes", "resolution"]
    assert abs(output_change(found, "resolution", 3)) < 0.1


def test_axes_without_being_named(files):
    lm = load(files["lm"], MUP["lm"])
    assert default_axes(lm) == {"width": [16, 32, 64, 128], "depth": [2, 4, 8]}
    assert default_axes(load(files["lm"])) == {"width": [16, 32, 64, 128]}
    fno = load(files["fno"])
    assert default_axes(fno) == {"width": [8, 16, 32, 64], "modes": [3, 6, 12], "resolution": [8, 16]}


def test_exponents_are_those_of_the_sizes():
    def trace(size: int) -> Any:
        return {"hidden": [(1.0, 0.0), (1.0, size**0.5)], OUTPUT: [(1 / size, 0.0), (0.0, 0.0)]}

    axis = Axis("width", [2, 4, 8], {(size, 0): trace(size) for size in (2, 4, 8)})
    found = {(s.site, s.quantity, s.step): s for s in _slopes(axis, 1, 0.2)}
    assert found["hidden", "change", 1].exponent == pytest.approx(0.5) and not found["hidden", "change", 1].ok
    assert found["hidden", "size", 1].ok
    assert found[OUTPUT, "size", 0].exponent == pytest.approx(-1) and found[OUTPUT, "size", 0].ok  # allowed to shrink
    assert (OUTPUT, "change", 1) not in found  # nothing has come through a readout at zero


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widths", "16"], "needs at least two sizes"),
        (["--widths", "16,x"], "give whole numbers"),
        (["--widths", "16,32", "--with", "model.heads=2"], "one value for each of the 2 widths"),
        (["--widths", "16,32", "--with", "model.heads"], "write it as --with"),
        (["--modes", "2,4"], "modes: model.name=transformer has no such axis"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--tolerance", "2"], "--tolerance 2: must lie between 0 and 1"),
        (["data.url=/nowhere"], "/nowhere: not a Keel data set"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(words, message, files, tmp_path, capsys):
    assert cli.main(["coordcheck", files["lm"], "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
