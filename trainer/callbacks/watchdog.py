"""Ends a process that makes no progress, after all ranks have said where they stand."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from datamodules.store import Store
from trainer.restarts import EXIT_HANG

log = logging.getLogger("keel.run")

# In the order of a step: of two ranks the one in the earlier phase keeps the other waiting.
PHASES = ("start-up", "data wait", "forward", "backward", "optimiser", "end of step", "save", "validation")

_ANSWER_S = 5.0  # how long the other ranks may take to say where they are
_EXCHANGE_S = 2 * _ANSWER_S  # with all that this takes
_UPLOAD_S = 20.0


class Watchdog(pl.Callback):
    """A thread that watches how long the process stays in one phase of one step. First in the list of callbacks;
    `ready` is last.

    From the set-up of the model on until the first step is done, and for a save, `init_seconds` are allowed, else
    `step_seconds`. When they are over, the ranks tell each other through the store of the process group where they are;
    each puts the Python stacks of its threads (and what the flight recorder of the collectives holds) under `hangs/AAAA/`
    of the run; one line names rank, host and phase, and the process ends with the exit code 76, on which the launcher
    starts the group again. A process that was stopped as a whole (a suspended machine) is given the time back when it
    goes on.

    Should Python itself be stuck (a library that never lets go of the interpreter), its stacks go to standard error
    after twice the time, and the process ends.

    Args:
        store: the run's URL.
        attempt: of the run.
        init_seconds, step_seconds: see above; `step_seconds=0` switches the watchdog off.
        tell: called with the line on one rank before the end: it writes the record.
    """

    def __init__(
        self,
        store: Store,
        attempt: int,
        *,
        init_seconds: float,
        step_seconds: float,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.store, self.attempt, self.tell = store, attempt, tell
        self.init_seconds, self.step_seconds = init_seconds, step_seconds
        self.poll_seconds = min(5.0, step_seconds / 10)
        self.ready = Ready(self)
        self._now: tuple[str, int, float, object] = ("start-up", 0, init_seconds, object())
        self._first = 0
        self._key = f"keel/hang/{attempt}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------------------ hooks
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.step_seconds or self._thread is not None:
            return
        self._enter("start-up", trainer)
        self._thread = threading.Thread(target=self._watch, name="keel-watchdog", daemon=True)
        self._thread.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = trainer.global_step
        self._enter("data wait", trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._enter("forward", trainer)

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._enter("backward", trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._enter("optimiser", trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._enter("end of step", trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._enter("validation", trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._enter("validation", trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._enter("save", trainer)  # the last one, and the last rows

    @property
    def now(self) -> tuple[str, int]:
        """(phase, step) of this process, also where it is not watched; from any thread."""
        return self._now[:2]

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save."""
        before = self._now
        self._now = ("save", before[1], self.init_seconds, object())
        try:
            yield
        finally:
            self._now = (*before[:3], object())

    def _enter(self, phase: str, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        long = phase in ("start-up", "save") or step == self._first
        self._now = (phase, step + 1, self.init_seconds if long else self.step_seconds, object())

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
            with contextlib.suppress(Exception):
                faulthandler.cancel_dump_traceback_later()

    # ------------------------------------------------------------------------------------------------------- the thread
    def _watch(self) -> None:
        asked = threading.Event()
        if dist.get_world_size() > 1:
            threading.Thread(target=self._ask, args=(asked,), name="keel-watchdog-ask", daemon=True).start()
        seen, spent, last = self._now[3], 0.0, time.monotonic()
        armed = 0.0
        while not self._stop.wait(self.poll_seconds):
            now = time.monotonic()
            passed, last = now - last, now
            phase, step, limit, token = self._now
            if token is not seen:
                seen, spent = token, 0.0
            else:
                spent += min(passed, 2 * self.poll_seconds)  # more than that was not this process's time
            if now - armed > self.poll_seconds * 4:
                armed = now
                with contextlib.suppress(Exception):  # standard error may be no file
                    faulthandler.dump_traceback_later(2 * self.init_seconds + 60, exit=True)
            if spent > limit or asked.is_set():
                self._hang(phase, step, spent)

    def _ask(self, asked: threading.Event) -> None:
        """Sets `asked` when another rank has found a hang. In a thread of its own: no question to the store of the process
        group has a time limit, and the process that holds it may be the one that stands still."""
        with contextlib.suppress(Exception):  # gone with the rank that held it: the launcher ends this one
            shared = _shared_store()
            while not self._stop.wait(self.poll_seconds):
                if shared.check([self._key]):
                    asked.set()
                    return

    def _hang(self, phase: str, step: int, seconds: float) -> None:
        me, world = dist.get_rank(), dist.get_world_size()
        mine = {"rank": me, "host": socket.gethostname(), "phase": phase, "step": step, "seconds": round(seconds, 1)}
        mine["waits"] = _in_collective()
        text = (
            f"rank {me} on {mine['host']}, pid {os.getpid()}: {phase} of step {step} for {seconds:.1f} s\n\n{stacks()}"
        )
        name = f"hangs/{self.attempt:04d}/rank-{me:05d}"
        files = {f"{name}.txt": text.encode()} | {f"{name}-collectives.json": raw for raw in _flight_recorder()}
        sending = threading.Thread(target=self._send, args=(files,), daemon=True)
        sending.start()
        heard, number = {me: mine}, [1]  # what the ranks say of themselves; this one is the n-th to find a hang
        shared: list[Any] = []

        def exchange() -> None:
            shared.append(_shared_store())
            shared[0].set(f"{self._key}/{me}", json.dumps(mine))
            number[0] = shared[0].add(self._key, 1)
            _answers(shared[0], self._key, world, heard)

        def leave() -> None:  # nobody leaves before all have written: the first to leave ends the others
            shared[0].add(f"{self._key}/done", 1)
            _until(lambda: shared[0].add(f"{self._key}/done", 0) >= len(known), _UPLOAD_S)

        met = world > 1 and _within(exchange, _EXCHANGE_S)
        known, first = dict(heard), number[0] == 1
        line = describe(known, world, self.store.join(f"hangs/{self.attempt:04d}"))
        sending.join(_UPLOAD_S)
        if sending.is_alive():
            print(text, file=sys.stderr, flush=True)
        if first:
            _within(lambda: self.tell(line), _UPLOAD_S)
        if met:
            _within(leave, _UPLOAD_S + 1)
        if first or me == 0:
            print(f"keel: error: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT_HANG)

    def _send(self, files: dict[str, bytes]) -> None:
        for path, raw in files.items():
            with contextlib.suppress(Exception):
                self.store.write(path, raw)


class Ready(pl.Callback):
    """The last callback of a step: what follows is the wait for data."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._watchdog._enter("data wait", trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._watchdog._enter("data wait", trainer)


def describe(known: dict[int, dict[str, Any]], world: int, place: str) -> str:
    """One line about a hang: who keeps the others waiting, where they are, and where the stacks lie.

    `known`: what each rank that answered said of itself.
    """
    silent = [rank for rank in range(world) if rank not in known]

    def place_of(each: dict[str, Any]) -> tuple[int, int, bool]:
        return each["step"], PHASES.index(each["phase"]), each["waits"]

    behind = min(known.values(), key=place_of)
    late = [each for each in known.values() if place_of(each) == place_of(behind)]
    longest = max(each["seconds"] for each in known.values())
    if silent:
        who = f"rank {', '.join(map(str, silent))} does not answer; the others"
        late = list(known.values())
    elif len(late) == world:
        who = f"all {world} ranks" if world > 1 else f"rank 0 on {behind['host']}"
    else:
        who = ", ".join(f"rank {each['rank']} on {each['host']}" for each in late)
    verb = "are" if silent or len(late) > 1 else "is"
    rest = sorted({(e["phase"], e["step"]) for e in known.values() if e not in late}, key=lambda e: PHASES.index(e[0]))
    others = "; the others wait in " + ", ".join(f"{phase} of step {step}" for phase, step in rest) if rest else ""
    return (
        f"no progress for {longest:.0f} s: {who} {verb} in {behind['phase']} of step {behind['step']}{others}; "
        f"stacks of {len(known)} of {world} ranks in {place}"
    )


def _in_collective() -> bool:
    """Whether the main thread is, so far as Python sees, inside torch's communication: it waits for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and frame.f_code.co_filename.startswith(os.path.dirname(dist.__file__))


def stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()


def _shared_store() -> Any:
    """A connection of this thread's own to the store of the process group: the main thread may be waiting on the other."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def _within(call: Callable[[], None], seconds: float) -> bool:
    """Makes a call that may never return or fail with what it talks to; whether it was over in time, and well."""
    well: list[bool] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            call()
            well.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(well)


def _answers(shared: Any, key: str, world: int, found: dict[int, dict[str, Any]]) -> None:
    """Puts what the ranks say of themselves into `found`, as many as answer in time."""

    def complete() -> bool:
        for rank in range(world):
            if rank not in found and shared.check([f"{key}/{rank}"]):
                found[rank] = json.loads(shared.get(f"{key}/{rank}"))
        return len(found) == world

    _until(complete, _ANSWER_S)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)


def _flight_recorder() -> Iterator[bytes]:
    """The last collectives of this rank as JSON, where torch has recorded any."""
    c10d: Any = torch._C._distributed_c10d
    dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return
    try:
        raw = dump()
    except Exception as error:
        log.warning("the last collectives are not told: %s", " ".join(str(error).split()))
        return
    yield raw if isinstance(raw, bytes) else raw.encode()
