"""Optional packages stay optional: every module imports without them."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import fno_config
from trainer import config as configs
from trainer import stored
from trainer.lifecycle import prepare_new

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


RESUME = """
import sys
import cluster.launch
from cluster import cli
from cluster.commands import run
cluster.launch.launch = lambda job: print(job.args, job.processes, job.threads, job.max_restarts) or 0
run.outcome = lambda url: f"the end of {url}"
assert cli.main(["resume", sys.argv[1]]) == 0
print([name for name in ("torch", "lightning", "numpy") if name in sys.modules])
"""


def test_a_resume_is_launched_without_what_only_its_worker_needs(tmp_path: Path) -> None:
    """Torch and Lightning take seconds to import: the launcher and the worker would do it one after the other."""
    url = str(tmp_path / "run")
    overrides = [
        "resources.processes_per_node=2",
        "resources.threads=3",
        "recovery.max_restarts=4",
        "train.global_batch=4",
    ]
    config = configs.load(fno_config(url, "/none"), overrides)
    prepare_new(config)
    done = subprocess.run([sys.executable, "-c", RESUME, url], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"('trainer', 'fit', '{url}', '--resume') 2 3 4", f"the end of {url}", "[]"]
    found = stored.read(url)
    assert found is not None and (found.resources, found.recovery) == (config.resources, config.recovery)


def test_a_stored_config_that_keel_has_not_written_is_left_to_the_strict_reader(tmp_path: Path) -> None:
    assert stored.read(str(tmp_path)) is None
    for text in (
        "[",
        "url: x",
        "url: x\nresources: {nodes: 0}\nrecovery: {}",
        "url: x\nresources: {node: 1}\nrecovery: {}",
    ):
        (tmp_path / "config.yaml").write_text(text)
        assert stored.read(str(tmp_path)) is None
