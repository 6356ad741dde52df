"""Shipping the code: the working tree as one archive in the store, named after its own content."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

from cluster.launch.cluster_config import ClusterConfig
from cluster.launch.spec import INDEX, CodeSpec
from datamodules.store import Store, join_url

ROOT = Path(__file__).resolve().parents[2]
_MOST_BYTES = 256 << 20


def code_spec(cluster: ClusterConfig, run_url: str, root: Path = ROOT) -> tuple[CodeSpec, bytes]:
    """Where the nodes will find the code, and the archive that `ship` must put there (empty unless it is a snapshot).

    Writes nothing.

    Raises:
        ValueError: no working tree to pack, or one that is too large.
    """
    from trainer.config import absolute_url

    code = cluster.code
    if code.how != "snapshot":
        return CodeSpec(code.how, code.where), b""
    data = pack(root)
    digest = hashlib.sha256(data).hexdigest()
    where = absolute_url(code.where) if code.where else join_url(_beside(run_url), "code")
    return CodeSpec("snapshot", join_url(where, f"{digest}.tar.gz"), digest), data


def ship(code: CodeSpec, data: bytes) -> None:
    """Puts the archive where `code` says, unless it is there already.

    Raises:
        StoreError: the store cannot be written to.
    """
    if code.how == "snapshot":
        base, _, name = code.where.rpartition("/")
        Store(base).create(name, data)


def pack(root: Path = ROOT) -> bytes:
    """The files below `root` that git knows or does not ignore, as they are now, as a tar.gz; equal trees give equal bytes.

    Raises:
        ValueError: `root` is no git checkout, holds too much, or a link that leads out of it.
    """
    from trainer.environment import SNAPSHOT, revision

    names = _files(root)
    for name in names:
        if (root / name).is_symlink():
            _inside(name, os.readlink(root / name))
    sizes = {name: (root / name).lstat().st_size for name in names}
    if sum(sizes.values()) > _MOST_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"{root}: the working tree holds {sum(sizes.values()) >> 20} MiB that git does not ignore (largest: {largest}); "
            f"a snapshot may have {_MOST_BYTES >> 20} MiB: add it to .gitignore, or set code.how=path"
        )
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name in names:
            tar.add(root / name, arcname=name, recursive=False, filter=_anonymous)
        origin = json.dumps(revision() if root == ROOT else {}, sort_keys=True).encode()
        entry = tarfile.TarInfo(SNAPSHOT)
        entry.size = len(origin)
        tar.addfile(entry, io.BytesIO(origin))
    return out.getvalue()


def _files(root: Path) -> list[str]:
    command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"code.how=snapshot packs a git checkout, and {root} is none that git can read; set code.how=image (installed "
            "on the nodes) or code.how=path"
        ) from error
    names = sorted(set(listed.decode().split("\0")) - {""})
    return [name for name in names if (root / name).is_symlink() or (root / name).is_file()]


def _inside(name: str, target: str) -> None:
    if os.path.isabs(target) or os.path.normpath(os.path.join(os.path.dirname(name), target)).startswith(".."):
        raise ValueError(f"{name} is a link to {target}, which no node has: add it to .gitignore, or set code.how=path")


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    entry.mode = 0o755 if entry.mode & 0o100 else 0o644
    return entry


def _beside(run_url: str) -> str:
    return run_url.split(INDEX)[0].rstrip("/").rpartition("/")[0]
