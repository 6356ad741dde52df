"""One driver of a sweep: what it sees in the store, and the few things that executors ask of it."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cluster.launch import EXIT_REQUEUE, EXIT_USER_ERROR
from cluster.sweep.claims import Claims
from cluster.sweep.results import Result, Results, failed, of_record
from cluster.sweep.table import Row, Table
from datamodules.store import NotFound, Store
from trainer import config as configs
from trainer.callbacks.pruning import JUDGE, JUDGE_SETTINGS
from trainer.records import read_record

_INTERRUPTED = 130


class Sweep:
    """A table, the claims and the results of its rows, seen by one driver. Use as a context: it then sends heartbeats.

    Args:
        table: what there is to do.
        retry: rows that failed are missing, too.
    """

    def __init__(self, table: Table, *, retry: bool = False) -> None:
        self.table, self.retry = table, retry
        self.store = Store(table.url)
        self.options = table.sweep
        self.results = Results(self.store, self.options["objective"])
        self.claims = Claims(self.store, self.options["expiry_s"])
        self.signal = 0
        self._retried: set[str] = set()

    def __enter__(self) -> Sweep:
        self.claims.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.claims.close()

    @property
    def over(self) -> bool:
        """Whether this driver is to end: told by a signal, or given up by another."""
        return bool(self.signal) or self.claims.lost.is_set()

    # ----------------------------------------------------------------------------------------------------- what is left
    def missing(self) -> list[Row]:
        """The rows without a result, the cheapest first; what others do at present is among them."""
        self.results.complete(self.table, self.claims.begun())
        rows = [row for row in self.table.rows if self._is_missing(row)]
        return sorted(rows, key=lambda row: row.flops)

    def _is_missing(self, row: Row) -> bool:
        found = self.results.rows.get(row.id)
        return found is None or (self.retry and found["status"] == "failed" and row.id not in self._retried)

    def claim(self, rows: Iterable[Row]) -> list[Row]:
        """Takes those of `rows` that are free and still to be done, in their order.

        Raises:
            Lost: another driver has given this one up.
        """
        wanted = [row for row in rows if self._is_missing(row)]
        mine = self.claims.claim([row.id for row in wanted])
        self.results.refresh()  # who had them before may have finished
        done = [row.id for row in wanted if row.id in mine and not self._is_missing(row)]
        self.claims.release(done)
        return [row for row in wanted if row.id in mine and row.id not in done]

    def release(self, rows: Iterable[Row]) -> None:
        """Gives rows back that were claimed and not done."""
        self.claims.release([row.id for row in rows])

    # --------------------------------------------------------------------------------------------------------- one row
    def begin(self, row: Row) -> configs.RunConfig:
        """Puts the config of a claimed row's run at its URL; returns it. A run that is there is continued: what it
        computes is the same, or it would not have this id."""
        config = self.table.config(row)
        Store(config.url).write("config.yaml", configs.to_yaml(config).encode())
        return config

    def job(self, row: Row) -> list[str]:
        """The words after `python` that train a row on this machine, from its last commit where there is one."""
        words = ["-P", "-m", "cluster.launch.node", "--run", self.table.run_url(row), "--processes", str(row.processes)]
        words += ["--restarts", str(self.options["retries"])]
        return [*words, "--", "trainer", "fit", self.table.run_url(row)]

    def environment(self, row: Row) -> dict[str, str]:
        """What the workers of a row find in their environment: who judges whether the run goes on."""
        stop = self.options["stop"]
        if not stop["first"]:
            return {}
        settings = {**stop, "objective": self.options["objective"], "sweep": self.table.url, "row": row.id}
        return {JUDGE: "cluster.sweep.stopping:halving", JUDGE_SETTINGS: json.dumps(settings)}

    def end(self, row: Row, code: int = 0, said: str = "") -> Result | None:
        """Adds the result of a claimed row, whose node ended with `code` (`said`: its last line). None: the run was
        interrupted after a save, and the row was given back."""
        self.claims.check()
        try:
            record: Mapping[str, Any] | None = read_record(Store(self.table.run_url(row)))
        except NotFound:
            record = None
        if code in (EXIT_REQUEUE, _INTERRUPTED):
            self.release([row])
            return None
        if code == 0 and record is not None and record["status"] in ("ok", "diverged", "pruned"):
            return self.add([of_record(row, record, self.options["objective"])])[0]
        error = said or (record or {}).get("error") or f"exit code {code}"
        if code == EXIT_USER_ERROR:
            error = error.removeprefix("keel: error: ")
        return self.add([failed(row, error)])[0]

    def add(self, results: Sequence[Result]) -> Sequence[Result]:
        """Adds results of claimed rows, and says so in a line.

        Raises:
            Lost: another driver has given this one up, and does these rows.
        """
        self.claims.check()
        self.results.add(results)
        self._retried |= {result["row"] for result in results}
        for result in results:
            if result["status"] == "failed":
                label = self.table.by_id[result["row"]].label
                print(
                    f"keel: warning: row {result['row']} ({label}) failed: {result['error']}",
                    file=sys.stderr,
                    flush=True,
                )
        done = sum(row.id in self.results.rows for row in self.table.rows)
        if len(results) == 1:
            loss = results[0]["loss"]
            what = f"{self.table.by_id[results[0]['row']].label}: {results[0]['status']}"
            what += "" if loss is None else f", {self.options['objective']} {loss:.6g}"
        else:
            what = f"{len(results)} rows"
        print(f"{done:,} of {len(self.table.rows):,} rows: {what}", flush=True)
        return results

    # ----------------------------------------------------------------------------------------------------------- signals
    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 and SIGINT set `signal`: executors then save and return."""

        def tell(signum: int, _: FrameType | None) -> None:
            if self.signal == signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = signum

        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if main else ()
        before = {signum: signal.signal(signum, tell) for signum in signals}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
