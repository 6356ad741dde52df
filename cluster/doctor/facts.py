"""What one process finds where it runs; nothing is measured here."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.launch.node_watch import code_version
from cluster.launch.spec import is_secret

_PACKAGES = ("torch", "lightning", "numpy", "fsspec", "s3fs", "deepspeed")
# Variables that change how ranks compute and talk, and must be alike.
_PREFIXES = ("NCCL_", "GLOO_", "OMP_", "MKL_", "PYTORCH_", "TORCH_", "CUBLAS_", "FI_", "UCX_")
_OWN = ("GLOO_SOCKET_IFNAME",)  # of each node
_LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "locked memory": resource.RLIMIT_MEMLOCK,
}


def facts(accelerator: str) -> dict[str, Any]:
    """Of this process, as plain data; bytes and counts. A limit of -1 is none."""
    shared = Path("/dev/shm")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": _versions(accelerator),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) and name not in _OWN and not is_secret(name)
        },
        "limits": {name: resource.getrlimit(kind)[0] for name, kind in _LIMITS.items()},
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "shared_memory": shutil.disk_usage(shared).free if shared.is_dir() else None,
        "temporary": shutil.disk_usage(tempfile.gettempdir()).free,
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        "devices": _devices(accelerator),
    }


def _versions(accelerator: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "keel code": code_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if accelerator == "cuda":
        import torch

        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        with contextlib.suppress(OSError, IndexError):
            line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
            found["driver"] = next(word for word in line.split() if word[:1].isdigit() and "." in word)
    return found


def _devices(accelerator: str) -> list[dict[str, Any]]:
    """The accelerator of this rank."""
    if accelerator != "cuda":
        return []
    import torch

    free, total = torch.cuda.mem_get_info()
    return [{"name": torch.cuda.get_device_name(), "memory": total, "free": free, "visible": torch.cuda.device_count()}]


def _memory() -> int | None:
    """Bytes that this process may use: the machine's, or its control group's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return min(total, int(Path(name).read_text()))
    return total
