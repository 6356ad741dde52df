"""Keel's streams beside mosaicml-streaming, litdata and webdataset: same data, batch and number of workers, one run.

Each library reads from its own environment (made on first use) data that it wrote in its own format, 16 MiB shards, in batches
of 16, shuffled, with 2 workers (Keel: threads), in a new process each time. Cold: files out of the page cache, or an empty
local cache in front of radosgw. Cached: the epochs after that. Repeats alternate over the libraries and the limits, so that
load hits all alike; a ratio is one of medians, beside which stand the least and the largest of the repeats. Limits of the
machine, on the same bytes: `preadv` into a preallocated batch by one thread, and 16 concurrent plain range GETs.

    python scripts/bench/stream.py --quick                               # some minutes, small data
    python scripts/bench/stream.py --case fields --source local          # some of it
    python scripts/bench/stream.py --json stream.json --markdown docs/results/stream.md
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import stream_envs
import stream_limits as limits
import stream_report as report
from _table import parser, save
from stream_cases import Case, cases, cpu_since
from stream_worker import RESUME_AT

from datamodules.store import Store

CEPH = ROOT / "scripts/services/ceph.sh"
WORKER = Path(__file__).with_name("stream_worker.py")
LIBRARIES = ("keel", "mosaicml-streaming", "litdata", "webdataset")
LIMIT = "limit"
TIMEOUT_S = 300.0


class Memory(threading.Thread):
    """Largest proportional set size of a process and its children, sampled 4 times a second."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session, self.peak, self.over = session, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.25):
            total = 0
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    try:
                        fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                        if int(fields[3]) == self.session:
                            lines = Path(f"/proc/{entry}/smaps_rollup").read_text().splitlines()
                            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
                    except (OSError, ValueError, IndexError):
                        continue
            self.peak = max(self.peak, total)


class Bench:
    """One run: where the data lie and what was measured."""

    def __init__(self, args: Any, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.pythons = {library: stream_envs.python(library, Path(args.envs)) for library in args.library}
        self.rows: list[dict[str, Any]] = []
        self.limits: list[dict[str, Any]] = []

    def worker(self, action: str, library: str, **spec: Any) -> dict[str, Any]:
        """One process of a library; an error is a result: {"error": its last line}."""
        spec = {"library": library, "quick": self.args.quick, **spec}
        log = self.folder / "worker.log"
        with log.open("w+") as out:
            process = subprocess.Popen(
                [self.pythons[library], str(WORKER), action, json.dumps(spec)],
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )  # fmt: skip
            memory = Memory(process.pid)
            memory.start()
            try:
                process.wait(TIMEOUT_S)
                reason = ""
            except subprocess.TimeoutExpired:
                reason = f"not done after {TIMEOUT_S:.0f} s"
            finally:
                memory.over.set()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # some leave workers behind
                process.wait()
        lines = log.read_text(errors="replace").strip().splitlines()
        for line in reversed(lines):
            if line.startswith("{"):
                return {**json.loads(line), "memory": memory.peak}
        return {"error": reason or (lines or ["no output"])[-1][:200]}

    def written(self, library: str, case: Case) -> str:
        """Folder of a case's data in a library's format, written if need be."""
        folder = self.folder / "data" / library / case.data
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            done = self.worker("write", library, case=case.name, folder=str(part))
            if "error" in done:
                raise SystemExit(f"{library} could not write {case.name}: {done['error']}")
            part.rename(folder)
        return str(folder)

    def uploaded(self, library: str, case: Case) -> str:
        """The same in the bucket."""
        folder, url = Path(self.written(library, case)), f"s3://keel/bench/{library}/{case.data}"
        store = Store(url)
        if not store.list():
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                store.write(str(path.relative_to(folder)), path.read_bytes())
            for name in store.list():  # a server reads an object slower when it does so for the first time
                store.read(name)
        return url

    def case(self, case: Case, source: str, log: Path) -> None:
        """All libraries and limits on one case from one source."""
        place = self.written if source == "local" else self.uploaded
        urls = {library: place(library, case) for library in self.args.library}
        variants = [(library, "auto") for library in self.args.library]
        if "keel" in self.args.library:
            variants += [("keel", "shards")] if source == "s3" and case.window else []
            variants.append((LIMIT, ""))
        for repeat in range(self.args.repeats):
            turn = repeat % len(variants)
            for library, fetch in variants[turn:] + variants[:turn]:
                if library == LIMIT:
                    self.limit(case, source, urls["keel"], repeat)
                else:
                    self.read(case, source, library, fetch, urls[library], repeat, log)

    def read(self, case: Case, source: str, library: str, fetch: str, url: str, repeat: int, log: Path) -> None:
        cache, states = (Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder)) for prefix in ("cache-", "states-"))
        spec = {
            "case": case.name, "url": url, "cache": str(cache), "workers": self.args.workers, "fetch": fetch,
            "epochs": 20 if library == "keel" else 2, "seconds": self.args.seconds,
            "states": str(states) if repeat == 0 else "",
        }  # fmt: skip
        result = self.worker("read", library, **spec)
        if source == "s3" and "cold_from" in result:
            prefix = url.removeprefix("s3://")
            requests, total = limits.fetched(log, prefix, result["cold_from"], result["cold_until"])
            # What is read ahead of the next epoch counts as fetched, not as used.
            result |= {"requests": requests, "fetched_per_used": total / (result["cold_samples"] * case.sample_bytes)}
        if result.get("states"):
            tries = 3 if library == "keel" and not self.args.quick else 1  # milliseconds need more than one look
            resumed = [
                [self.worker("resume", library, share=share, **spec).get("resume_s") for share in RESUME_AT]
                for _ in range(tries)
            ]
            result["resume_s"] = [report.median(times) for times in zip(*resumed, strict=True)]
        name = library if fetch == "auto" else f"{library} ({fetch})"
        self.rows.append({"case": case.name, "source": source, "library": name, "repeat": repeat, **result})
        shown = f"cold {result['cold_s']:.2f} s" if "cold_s" in result else result.get("error")
        print(f"{case.name} {source} {repeat} {name}: {shown}", file=sys.stderr, flush=True)
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(states, ignore_errors=True)

    def limit(self, case: Case, source: str, url: str, repeat: int) -> None:
        row = {"case": case.name, "source": source, "repeat": repeat}
        folder = self.written("keel", case)
        row["cached"] = limits.readinto(case, folder, False, self.args.seconds)
        if source == "local":
            row["cold"] = limits.readinto(case, folder, True, 0.0)
        else:
            before = resource.getrusage(resource.RUSAGE_SELF)
            row["cold"] = limits.range_gets(case, url, shards=not case.window)
            row["cpu_s"] = cpu_since(before)
        self.limits.append(row)


def start_ceph(folder: Path) -> Path:
    """Starts Ceph with room for all data, sets the environment, returns the log of requests."""
    environment = {
        **os.environ,
        "KEEL_CEPH_BYTES": str(8 << 30),
        "KEEL_CEPH_MEMORY": str(1 << 30),
        "KEEL_CEPH_REQUESTS": "1",
    }
    done = subprocess.run(["bash", str(CEPH), "up", str(folder)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    for line in done.stdout.splitlines():
        name, value = line.removeprefix("export ").split("=", 1)
        os.environ[name] = value
    os.environ["AWS_REGION"] = os.environ["AWS_DEFAULT_REGION"]
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]  # mosaicml-streaming's name for it
    return folder / "log" / "requests.log"


def joined(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several runs; of a case from a source those of the last run that has it, as the note says."""

    def place(row: dict[str, Any]) -> tuple[str, str]:
        return row["case"], row["source"]

    found, *others = files
    order = list(dict.fromkeys(map(place, found["rows"])))
    for other in others:
        again = list(dict.fromkeys(map(place, other["rows"])))
        order += [which for which in again if which not in order]
        for kind in ("rows", "limits"):
            kept = [row for row in found[kind] if place(row) not in again]
            found[kind] = sorted(kept + other[kind], key=lambda row: order.index(place(row)))
        which = "Of these, " + " and ".join(f"{case} from {source}" for case, source in again)
        found["note"] = (
            f"{found['note']} {which}: measured again at {other['commit']}, load {other['load']:.1f}.".strip()
        )
    return found


def main() -> None:
    arguments = parser(__doc__)
    names = list(cases(False))
    arguments.add_argument("--quick", action="store_true", help="small data, one repeat")
    arguments.add_argument("--case", action="append", choices=names, help="only these; may be repeated")
    arguments.add_argument("--source", action="append", choices=["local", "s3"], help="only these; may be repeated")
    arguments.add_argument("--library", action="append", choices=LIBRARIES, help="only these; may be repeated")
    arguments.add_argument("--repeats", type=int, default=0, help="paired repeats (3; 1 with --quick)")
    arguments.add_argument("--workers", type=int, default=2, help="worker processes of the peers, threads of Keel (2)")
    arguments.add_argument("--seconds", type=float, default=1.5, help="least time over cached epochs (1.5)")
    arguments.add_argument(
        "--envs", default=str(stream_envs.default_folder()), help="where the peers' environments lie"
    )
    arguments.add_argument("--folder", help="where to put data; a temporary folder if not given, removed at the end")
    arguments.add_argument("--note", default="", help="a sentence for the report: what else ran, for instance")
    arguments.add_argument(
        "--from-json",
        metavar="FILE",
        action="append",
        help="only make the tables of figures that were saved; of several files the last that has a case counts",
    )
    args = arguments.parse_args()
    if args.from_json:
        figures = joined([json.loads(Path(file).read_text()) for file in args.from_json])
        report.show_all({**figures, "note": args.note or figures.get("note", "")}, args.markdown)
        return
    args.case, args.source = args.case or names, args.source or ["local", "s3"]
    args.library = args.library or list(LIBRARIES)
    args.repeats = args.repeats or (1 if args.quick else 3)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="keel-bench-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    bench = Bench(args, folder)

    def figures() -> dict[str, Any]:
        return {
            "rows": bench.rows, "limits": bench.limits, "quick": args.quick, "workers": args.workers,
            "note": args.note, "repeats": args.repeats, "minutes": (time.time() - began) / 60, **report.environment(bench.pythons),
        }  # fmt: skip

    try:
        log = start_ceph(folder / "ceph") if "s3" in args.source else folder / "none"
        for name in args.case:
            for source in args.source:
                bench.case(cases(args.quick)[name], source, log)
                # The report is more than one table; what there is of it is kept, should a later case fail.
                save(argparse.Namespace(json=args.json, markdown=None), figures())
                report.show_all(figures(), args.markdown)
    finally:
        subprocess.run(["bash", str(CEPH), "down", str(folder / "ceph")], check=False)
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
