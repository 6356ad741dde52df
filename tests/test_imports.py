"""Optional packages stay optional: every module imports without them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = [
    "deepspeed",
    "ray",
    "s3fs",
    "boto3",
    "tokenizers",
    "h5py",
    "h5netcdf",
    "xarray",
    "zarr",
    "dysts",
    "obstore",
    "pyarrow",
]
SCRIPT = f"""
import importlib, pkgutil, sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # an import of it now fails
count = 0
for package in ("trainer", "modules", "datamodules", "cluster"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            count += 1
print(count)
"""


def test_every_module_imports_without_optional_packages() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
