"""The page: complete, self-contained, safe, and there for runs of which parts are missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cluster.report import report
from cluster.report.page import headline
from cluster.report.plots import fields
from cluster.report.view import RunView, curves, families, load, smooth, thin
from datamodules.store import Store
from tests.cluster.synthetic import fields as wave
from tests.cluster.synthetic import language_run, operator_run

VOID = {"meta", "img", "link", "br", "hr", "use", "path", "rect", "line", "circle", "stop"}


class Balanced(HTMLParser):
    """Checks that every tag is closed, and collects ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(str(dict(attrs)["id"]))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag


def sections(page: str) -> list[str]:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return parser.sections


def page_of(url: str) -> str:
    return Path(report(url)).read_text()


def assert_self_contained(page: str) -> None:
    # Names of XML vocabularies are not addresses that a browser opens.
    page = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    loaded = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert loaded
    assert all((a or b).startswith(("#", "data:", "&quot;#", '"#')) for a, b in loaded)
    assert "<script" not in page


def test_operator_run_shows_everything(tmp_path: Path) -> None:
    operator_run(str(tmp_path / "run"))
    page = page_of(str(tmp_path / "run"))
    assert_self_contained(page)
    assert sections(page) == [
        "results", "loss", "evaluation", "throughput", "diagnostics", "validation", "attempts", "config",
        "environment", "record",
    ]  # fmt: skip
    assert "resumed (attempt 2)" in page
    assert "activations/rms_block_*" in page and "rms_block_03" not in page
    assert "data:image/png;base64," in page
    assert "persistence/relative_l2" in page
    assert "fno &lt;demo&gt;" in page and "<demo>" not in page
    assert "<dc:date>" not in page


def test_language_run_shows_its_baseline_and_events(tmp_path: Path) -> None:
    language_run(str(tmp_path / "run"))
    page = page_of(str(tmp_path / "run"))
    assert_self_contained(page)
    assert "baseline.bigram_bits_per_byte" in page
    assert "events" in sections(page) and "spike" in page
    assert "evaluation" not in sections(page)


@pytest.mark.parametrize(
    "missing", ["evaluation.json", "evaluation.npz", "record.jsonl", "config.yaml", "metrics", "attempts"]
)
def test_a_missing_part_is_left_out(missing: str, tmp_path: Path) -> None:
    store = operator_run(str(tmp_path / "run"))
    store.delete_tree(missing)
    page = page_of(store.url)
    sections(page)
    assert page.endswith("</html>")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    store.write("config.yaml", b"name: young\n")
    page = page_of(store.url)
    assert sections(page) == ["config"]
    assert "running or interrupted" in page


def test_a_running_run_has_no_status_of_its_own(tmp_path: Path) -> None:
    view = load(operator_run(str(tmp_path / "run"), finished=False))
    assert view.status == "running or interrupted"
    assert dict(headline(view))["steps"] == "200 of 200"


def test_what_an_interrupted_attempt_did_beyond_its_checkpoint_is_not_drawn(tmp_path: Path) -> None:
    view = load(operator_run(str(tmp_path / "run")))
    steps, _ = view.series("loss")
    assert steps == [float(step) for step in range(1, 201)]
    assert view.resumes == [(2, 100)]


def test_headline_tells_how_far_below_persistence(tmp_path: Path) -> None:
    cards = dict(headline(load(operator_run(str(tmp_path / "run")))))
    assert cards["times below persistence, one step"] == f"{0.31 / 0.0212:.1f}"
    assert cards["relative_l2 (test)"] == "0.0212"


def test_remote_run_gets_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = operator_run("memory://bucket/report-test/run")
    path = report(store.url)
    assert Path(path).read_bytes() == store.read("report.html")
    assert Path(path).resolve().is_relative_to(tmp_path)


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    from trainer.records import MetricsWriter, start_attempt

    store = Store(str(tmp_path / "run"))
    start_attempt(store, {})
    writer = MetricsWriter(store, 1)
    writer.extend(
        {"step": s, "loss": [1.0, float("nan"), float("inf"), -1.0][s], "val/x": float("nan")} for s in range(4)
    )
    writer.close()
    assert "loss" in sections(page_of(store.url))


@pytest.mark.parametrize("shape", [(5, 1, 32), (5, 2, 16, 16), (5, 1, 8, 8, 8), (1, 1, 16, 12)])
def test_fields_of_one_to_three_dimensions(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape)
    picture = fields({"truth": values, "prediction": values * 1.1})
    assert picture.startswith("<svg" if len(shape) == 3 else "<img")


def test_thinning_keeps_the_spikes_and_the_ends() -> None:
    values = [0.0] * 10_000
    values[5_431], values[7_777] = 9.0, -9.0
    xs, ys = thin(([float(i) for i in range(10_000)], values), most=500)
    assert len(xs) <= 510
    assert {5_431.0, 7_777.0, 0.0, 9_999.0} <= set(xs)
    assert (max(ys), min(ys)) == (9.0, -9.0)
    assert xs == sorted(xs)


def test_smoothing_of_a_constant_is_the_constant() -> None:
    assert smooth([3.0] * 50, 10) == pytest.approx([3.0] * 50)
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]


def test_curves_are_ordered_by_lead_time() -> None:
    found = curves({"a@10": 3.0, "a@2": 2.0, "a@1": 1.0, "b@1": 1.0, "c": 4.0})
    assert found == {"a": ([1.0, 2.0, 10.0], [1.0, 2.0, 3.0])}


def test_families_are_told_by_block_numbers_only() -> None:
    assert families(["rms_block_01", "rms_block_00", "relative_l2", "relative_l1"]) == {
        "rms_block_*": ["rms_block_00", "rms_block_01"],
        "relative_l2": ["relative_l2"],
        "relative_l1": ["relative_l1"],
    }


def test_the_same_view_gives_the_same_figures() -> None:
    arrays = wave(steps=4, size=16)
    assert fields(arrays) == fields(arrays)
    assert RunView(url="x/y").name == "y"
