"""Range reads from radosgw: s3fs's `cat_ranges`, the store's direct reads, and 16 plain connections, in turn.

Why the store reads past s3fs: the table says what each client makes of the same server.

    python scripts/bench/stream_clients.py [--repeats 7] [--json FILE] [--markdown FILE]
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from _table import parser, save, show
from stream import CEPH, start_ceph
from stream_limits import CONNECTIONS, gets

from datamodules.store import Store

SIZES = {64 << 10: 32 << 20, 256 << 10: 64 << 20, 1 << 20: 192 << 20, 8 << 20: 192 << 20}  # of a range -> of all
OBJECT = 96 << 20


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(url: str, repeats: int) -> list[dict[str, Any]]:
    """Medians over paired repeats for each size of ranges and each client."""
    slow, fast = Store(url, direct=False, concurrency=CONNECTIONS), Store(url, concurrency=CONNECTIONS)
    for name in ("0", "1"):
        slow.write(name, os.urandom(OBJECT))
    out = []
    for size, total in SIZES.items():
        count = OBJECT // size
        spans = [(str(i // count % 2), i % count * size, i % count * size + size) for i in range(total // size)]
        clients = {"s3fs": slow.read_ranges, "direct": fast.read_ranges, "plain": lambda s: gets(url, fast, s)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
        for repeat in range(repeats + 1):
            for name, read in clients.items():
                used, began = cpu(), time.perf_counter()
                read(spans)
                if repeat:  # the first is for warming up
                    times[name].append((time.perf_counter() - began, cpu() - used))
        for name, found in times.items():
            took, used = (statistics.median(values) for values in zip(*found, strict=True))
            out.append(
                {"client": name, "range": size, "mb_s": total / took / 1e6, "per_s": len(spans) / took, "cpu": used}
            )
    return out


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=7, help="paired repeats (7)")
    args = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="keel-bench-"))
    try:
        start_ceph(folder)
        figures = measure("s3://keel/clients", args.repeats)
    finally:
        subprocess.run(["bash", str(CEPH), "down", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    rows = [[f"{r['range'] >> 10} KiB", r["client"], r["mb_s"], r["per_s"], r["cpu"]] for r in figures]
    note = f"{CONNECTIONS} requests at a time; medians of {args.repeats} paired repeats; server and client share the machine"
    show(
        "Range reads from radosgw, by client",
        ("range", "client", "MB/s", "requests/s", "CPU s of the client"),
        rows,
        note,
    )
    save(args, {"clients": figures})


if __name__ == "__main__":
    main()
