"""Where a run happened: written with each attempt and shown in the report."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SNAPSHOT = ".keel-snapshot.json"  # at the root of a snapshot of the code: what `revision` said where it was made


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def revision() -> dict[str, Any]:
    """`{"revision": commit, "dirty": bool}` of the checkout that holds this code, or of which it is a snapshot; both None
    when there is none."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:  # installed below somebody else's repository
        if (root / SNAPSHOT).is_file():
            return {"revision": None, "dirty": None} | json.loads((root / SNAPSHOT).read_text())
        return {"revision": None, "dirty": None}
    status = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return {"revision": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def environment() -> dict[str, Any]:
    """Host, versions, code revision, world and devices of this process. JSON-ready; no collective."""
    devices = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "keel": _version("keel"),
        **revision(),
        "torch": torch.__version__,
        "lightning": _version("lightning"),
        "cuda": torch.version.cuda,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "devices": devices,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
