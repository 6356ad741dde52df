"""What a run does not need is not imported, and torchmetrics works all the same."""

import subprocess
import sys

PROGRAM = """
import sys
{first}
import trainer, importlib.util
assert importlib.util.find_spec('torchmetrics')  # looking is not importing
import trainer.run
import lightning.pytorch as pl
import torch, torchmetrics
from lightning_utilities.core.imports import RequirementCache, package_available
error = torchmetrics.MeanSquaredError()
error.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
assert float(error.compute()) == 2.0
assert RequirementCache("scipy") and RequirementCache("matplotlib") and package_available("scipy")
assert pl.LightningModule.log
import importlib.resources
assert importlib.resources.files("torchmetrics").joinpath("py.typed").is_file()
print(*(name in sys.modules for name in ("scipy", "matplotlib")))
"""


def run(first: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_run_imports_neither_scipy_nor_matplotlib() -> None:
    assert run("") == "False False"


def test_who_imports_torchmetrics_first_has_all_of_it() -> None:
    assert run("import torchmetrics") == "True True"
