"""One virtual environment per peer, made on first use below a cache folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

# Without the second constraint pip takes an s3fs of 2020 beside boto3.
CONSTRAINTS = ("s3fs>=2025.1",)
PACKAGES = {
    "mosaicml-streaming": ("mosaicml-streaming==0.13.0",),
    "litdata": ("litdata==0.2.76", "s3fs", "boto3"),
    "webdataset": ("webdataset==1.0.2", "boto3"),
}
MODULES = {"mosaicml-streaming": "streaming", "litdata": "litdata", "webdataset": "webdataset"}
# mosaicml-streaming imports torchvision, whose build often does not match torch's; nothing here uses its images.
STUB = {
    "__init__.py": "",
    "datasets.py": "class VisionDataset: ...\nclass CIFAR10: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "def to_tensor(image): raise RuntimeError('a stand-in for torchvision')\n",
}


def default_folder() -> Path:
    return Path(os.environ.get("KEEL_CACHE") or Path.home() / ".cache" / "keel") / "bench-stream"


def python(library: str, folder: Path) -> str:
    """The interpreter with `library`; Keel's own is this one."""
    if library == "keel":
        return sys.executable
    import torch

    pins = (f"torch=={torch.__version__.split('+')[0]}", *CONSTRAINTS)
    stamp_text = "\n".join((*PACKAGES[library], *pins, *STUB.values()))
    home = folder / library
    interpreter, stamp = str(home / "bin" / "python"), home / "keel-stamp"
    if stamp.is_file() and stamp.read_text() == hashlib.sha256(stamp_text.encode()).hexdigest():
        return interpreter
    print(f"making the environment of {library} in {home} (once; some minutes)", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / f"{library}.constraints"
    constraints.write_text("\n".join(pins) + "\n")
    if not Path(interpreter).exists():
        _run(sys.executable, "-m", "venv", str(home))
    install = (interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints))
    _run(*install, "torch", *PACKAGES[library])
    if _fails(interpreter, MODULES[library]):
        _run(interpreter, "-m", "pip", "uninstall", "--quiet", "-y", "torchvision")
        site = subprocess.check_output(
            [interpreter, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
        ).strip()
        for name, content in STUB.items():
            path = Path(site, "torchvision", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        error = _fails(interpreter, MODULES[library])
        if error:
            raise SystemExit(f"{library} cannot be imported in {home}: {error}")
    stamp.write_text(hashlib.sha256(stamp_text.encode()).hexdigest())
    return interpreter


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _fails(interpreter: str, module: str) -> str:
    """The last line of an import's error; empty if it works."""
    done = subprocess.run([interpreter, "-c", f"import {module}"], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else ""
