"""Many small rows in few processes: without a process start for each, one after another or as stacks of networks.

The driver is the worker. With several workers, each is a driver of its own (`cluster.sweep.drive`), and claims share the
rows out: hundreds at once where they are stacked. Rows that were in the hands of a driver that died are tried alone from
then on, so that one that kills its process takes no others with it, and is told failed in the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from cluster.launch import EXIT_USER_ERROR, PARENT_PID, available_cores
from cluster.launch.code import ROOT
from cluster.sweep.results import failed, of_record
from cluster.sweep.sweep import Sweep
from cluster.sweep.table import Row
from trainer import stacked
from trainer.config import ConfigError

_POLL_S = 0.05


class Packed:
    """See `cluster.sweep.executor.Executor`.

    Args:
        workers: processes; 0 for one per core.
    """

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers or available_cores()

    def check(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.nodes * row.processes > 1:
                raise ValueError(
                    f"row {row.id} ({row.label}) needs {row.nodes * row.processes} processes, but packed rows have one each"
                )
        if sweep.options["packed"]["stacked"]:
            for row in rows:
                try:
                    stacked.refuse(sweep.table.config(row))
                except ConfigError as error:
                    raise ConfigError(f"row {row.id} ({row.label}): {error}") from error

    def run(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        if self.workers > 1 and len(rows) > 1:
            share(sweep, self.workers, lambda count: self._drivers(sweep, count))
        else:
            self._work(sweep, rows)

    # --------------------------------------------------------------------------------------------------------- sharing
    def _drivers(self, sweep: Sweep, count: int) -> list[int]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // count))
        env = {**os.environ, "PYTHONPATH": path, PARENT_PID: str(os.getpid()), "OMP_NUM_THREADS": threads}
        words = [sys.executable, *driver_words(sweep)]
        drivers = [
            subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True, env=env) for _ in range(count)
        ]
        told = False
        try:
            while any(driver.poll() is None for driver in drivers):
                if sweep.over and not told:
                    told = True
                    for driver in drivers:
                        driver.send_signal(signal.SIGTERM)
                time.sleep(_POLL_S)
        finally:
            for driver in drivers:
                driver.kill()
                driver.wait()
        return [driver.returncode for driver in drivers]

    # ---------------------------------------------------------------------------------------------------------- working
    def _work(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        alone: list[Row] = []
        for chunk in self._chunks(sweep, rows):
            if sweep.over:
                return
            mine = sweep.claim(chunk)
            suspects = [row for row in mine if sweep.claims.deaths(row.id)[0]]
            if len(mine) > 1 and suspects:
                sweep.release(suspects)
                alone += suspects
                mine = [row for row in mine if row not in suspects]
            self._train(sweep, mine)
        for row in alone:
            if sweep.over:
                return
            self._train(sweep, sweep.claim([row]))

    def _chunks(self, sweep: Sweep, rows: Sequence[Row]) -> Iterator[list[Row]]:
        cells, stack = sweep.options["packed"]["cells"], sweep.options["packed"]["stacked"]
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(stacked.kind(sweep.table.config(row)) if stack else "", []).append(row)
        for group in groups.values():
            for begin in range(0, len(group), cells):
                yield group[begin : begin + cells]

    def _train(self, sweep: Sweep, rows: list[Row]) -> None:
        for row in list(rows):
            deaths = sweep.claims.deaths(row.id)[1]
            if deaths > sweep.options["retries"]:
                sweep.add([failed(row, f"{deaths} processes died while they trained it and nothing else")])
                rows.remove(row)
        if not rows:
            return
        if sweep.options["packed"]["stacked"]:
            self._stack(sweep, rows)
            return
        for i, row in enumerate(rows):
            if sweep.over or not self._one(sweep, row):
                sweep.release(rows[i:])
                return

    def _stack(self, sweep: Sweep, rows: list[Row]) -> None:
        try:
            records = stacked.train([sweep.table.config(row) for row in rows])
        except (RuntimeError, ValueError, OSError) as error:
            if len(rows) > 1:  # whose fault it is shows when each is alone
                for row in rows:
                    self._stack(sweep, [row])
                return
            sweep.add([failed(rows[0], f"{type(error).__name__}: {' '.join(str(error).split())}")])
            return
        objective = sweep.options["objective"]
        sweep.add([of_record(row, record, objective) for row, record in zip(rows, records, strict=True)])

    def _one(self, sweep: Sweep, row: Row) -> bool:
        """Trains one row in this process; False where it was interrupted."""
        from trainer.run import fit

        config = sweep.begin(row)
        error = ""
        for _ in range(1 + sweep.options["retries"]):
            try:
                with _environment(sweep.environment(row)):
                    record = fit(config, resume=True)
            except Exception as failure:  # of this row, not of the others
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
                if isinstance(failure, ValueError):
                    break
                continue
            if record["status"] in ("preempted", "interrupted"):  # the run had the signal
                sweep.signal = signal.SIGINT if record["status"] == "interrupted" else signal.SIGTERM
                return False
            sweep.add([of_record(row, record, sweep.options["objective"])])
            return True
        sweep.add([failed(row, error)])
        return True


def share(sweep: Sweep, workers: int, drivers: Callable[[int], list[int]]) -> None:
    """Starts drivers, at most `workers` at once, until nothing is left that one of them could claim.

    Args:
        drivers: starts so many, waits for them, and gives their exit codes.
    """
    left = len(sweep.missing())
    for _ in range(2 + len(sweep.table.rows)):
        codes = drivers(min(workers, left))
        held = sweep.claims.held()
        left = sum(row.id not in held for row in sweep.missing())
        if sweep.over or not left or all(code == 0 for code in codes):
            return
        if any(code == EXIT_USER_ERROR for code in codes):  # it has said why
            raise ValueError("a driver of packed rows could not go on")


def driver_words(sweep: Sweep) -> list[str]:
    """The words after `python` of a driver that does packed rows one after the other."""
    words = ["-P", "-m", "cluster.sweep.drive", sweep.table.url, "--executor", "packed", "--workers", "1"]
    return [*words, *(["--retry"] if sweep.retry else [])]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
