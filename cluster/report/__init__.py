"""One HTML page about one run: self-contained, no network needed to view it.

    report("s3://bucket/runs/fno")  # writes s3://bucket/runs/fno/report.html, returns the path of a local copy

It reads only what the run wrote (config, attempts, metrics, record, evaluation), so it works while the run is going and
for runs whose parts are missing.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.report.page import render
from cluster.report.view import load
from datamodules.store import Store

__all__ = ["report"]

PAGE = "report.html"
LOCAL_COPIES = Path(".keel/reports")


def report(url: str, out: str | None = None) -> str:
    """Writes the page of the run at `url` to `<url>/report.html`.

    Args:
        url: the run.
        out: also write the page to this local file.

    Returns:
        The local path of the page: `out`, else the page itself where the run is local, else that of a copy.

    Raises:
        StoreError: the run cannot be read, or the page not written.
    """
    store = Store(url)
    page = render(load(store)).encode()
    store.write(PAGE, page)
    if out is None and store.is_local:
        return store.local_path(PAGE)
    copy = Path(out) if out is not None else LOCAL_COPIES / (re.sub(r"[^\w.-]+", "-", store.url).strip("-") + ".html")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(page)
    return str(copy)
