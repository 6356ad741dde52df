"""keel checkpoint ls, show, verify, export, prune, diff on a run of three checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster import cli
from datamodules.store import Store
from tests.helpers.runs import fno_config
from trainer import config as configs
from trainer.build import _task
from trainer.checkpoint import Checkpointer, Retention, committed_steps


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Steps 10, 20 and 30; the weights of step 30 are those of step 20 but for one bias; 20 has the best metric."""
    url = str(tmp_path / "run")
    config = configs.load(fno_config(url, str(tmp_path / "data")), ["checkpoint.every=10"])
    store = Store(url)
    store.write("config.yaml", configs.to_yaml(config).encode())
    torch.manual_seed(0)
    task = _task(config)
    optimizer = torch.optim.AdamW(task.parameters())
    for step, lr in ((10, 1.0), (20, 1.0), (30, 2.0)):
        with torch.no_grad():
            bias = next(p for name, p in task.named_parameters() if name.endswith("bias"))
            if step < 30:
                for parameter in task.parameters():
                    parameter.add_(1.0)
            else:
                bias.mul_(3.0)
        described = {"config": {**configs.to_dict(config), "seed": int(lr)}}
        saver = Checkpointer(store.sub("checkpoints"), described, retention=Retention(keep_last=9))
        stream = {"position": 8 * step, "epoch": 0}
        saver.save(step, task, [optimizer], {}, device=torch.device("cpu"), stream=stream)
        saver.note(step, {"val/loss": float(abs(step - 20))})
    return url


def out(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_ls_and_show(run, capsys):
    assert cli.main(["checkpoint", "ls", run]) == 0
    text = out(capsys)
    assert text.count("committed") == 3 and "val/loss 0" in text and "val/loss 10" in text
    assert cli.main(["checkpoint", "show", run, "--step", "20"]) == 0
    text = out(capsys)
    assert "step-00000020" in text and "by 1 processes, strategy fsdp" in text and "sample 160 of epoch 0" in text
    assert "model.network" in text and "optimizer.0" not in text and "more: --all" in text
    assert cli.main(["checkpoint", "show", run, "--all"]) == 0
    assert "optimizer.0.state.network" in out(capsys)
    assert cli.main(["checkpoint", "verify", run]) == 0


def test_export_is_loaded_by_the_library(run, tmp_path, capsys):
    file = str(tmp_path / "out" / "w.safetensors")
    assert cli.main(["checkpoint", "export", run, file, "--step", "20"]) == 0
    assert "tensors of step 20" in out(capsys)
    network = _task(configs.load(f"{run}/config.yaml")).network
    network.load_state_dict(load_file(file))
    assert cli.main(["checkpoint", "export", run, file, "--ema"]) == 2
    assert cli.main(["checkpoint", "export", run, str(tmp_path / "w.pt")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_prune_says_first_and_then_does(run, tmp_path, capsys):
    checkpoints = Store(run).sub("checkpoints")
    checkpoints.write("step-00000015/rank-00000-000.bin", b"left by a kill")
    checkpoints.write("step-00000035/rank-00000-000.bin", b"perhaps being written")
    for argv in (["--dry-run"], ["--best", "val/loss", "--keep-every", "10", "--dry-run"]):
        assert cli.main(["checkpoint", "prune", run, *argv]) == 0
    text = out(capsys)
    assert "2 of 4 would be removed" in text and "1 of 4 would be removed" in text
    assert committed_steps(checkpoints) == [10, 20, 30] and checkpoints.exists("step-00000015/rank-00000-000.bin")
    assert cli.main(["checkpoint", "prune", run, "--keep-last", "1"]) == 2
    assert cli.main(["checkpoint", "prune", run]) == 0
    assert committed_steps(checkpoints) == [20, 30]
    left = {path.partition("/")[0] for path in checkpoints.list("")}
    assert left == {"metrics", "step-00000020", "step-00000030", "step-00000035"}
    assert checkpoints.list("metrics") == ["metrics/step-00000020.json", "metrics/step-00000030.json"]


def test_diff_tells_what_changed(run, tmp_path, capsys):
    assert cli.main(["checkpoint", "diff", run]) == 1
    text = out(capsys)
    assert "step-00000030 against" in text and "seed 2 1" in text
    assert ", 1 differ, 0 have no equal" in text
    assert cli.main(["checkpoint", "diff", run, "--step", "20", "--other-step", "20", "--all"]) == 0
    assert "0 differ, 0 have no equal" in out(capsys)
    wide = str(tmp_path / "wide")
    raw = fno_config(wide, str(tmp_path / "data"))
    config = configs.load(raw, ["model.width=10"])
    Store(wide).write("config.yaml", configs.to_yaml(config).encode())
    task = _task(config)
    saver = Checkpointer(Store(wide).sub("checkpoints"), {"config": configs.to_dict(config)})
    saver.save(1, task, [torch.optim.SGD(task.parameters())], {}, device=torch.device("cpu"))
    assert cli.main(["checkpoint", "diff", run, wide]) == 1
    text = out(capsys)
    assert "model.width 8 10" in text and "shape in first" in text
    assert cli.main(["checkpoint", "diff", wide]) == 2
    assert cli.main(["checkpoint", "show", str(tmp_path / "nothing")]) == 2
