"""Schedules against their closed forms; parameter groups by role."""

import math

import pytest
import torch
from torch import nn

from modules.roles import declare
from trainer import optim, parametrization
from trainer.optim import schedule
from trainer.parametrization.rule import Case


def factor(step: int, name: str, **other: float) -> float:
    arguments = {"max_steps": 100, "warmup_steps": 10, "min_lr_ratio": 0.1, "decay_steps": 0, **other}
    return schedule.factor(step, name=name, **arguments)  # type: ignore[arg-type]


def test_warm_up_is_linear_and_reaches_one():
    assert [factor(s, "constant") for s in (0, 4, 9, 10, 99)] == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1, 1])


def test_cosine_linear_and_wsd():
    assert factor(10, "cosine") == 1
    assert factor(55, "cosine") == pytest.approx(0.55)
    assert factor(32, "cosine") == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert factor(100, "cosine") == pytest.approx(0.1) and factor(500, "cosine") == pytest.approx(0.1)
    assert factor(55, "linear") == pytest.approx(0.55)
    assert factor(80, "wsd", decay_steps=20) == 1 and factor(90, "wsd", decay_steps=20) == pytest.approx(0.55)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2)
        declare(self.a, weight="hidden", bias="vector")
        declare(self.b, weight="readout", bias="vector")


def test_vectors_are_not_decayed_and_groups_follow_rules():
    config_of, standard = parametrization.lookup("standard")
    config_class, build = optim.lookup("adamw")
    net = Net()
    rules = standard(config_of()).rules(net, None, Case("adam", 1e-2))
    groups = parametrization.groups(dict(net.named_parameters()), rules, lr=1e-2, weight_decay=0.3)
    optimizer = build(config_class(lr=1e-2, weight_decay=0.3), groups)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(net.a.weight)] == decay[id(net.b.weight)] == 0.3
    assert decay[id(net.a.bias)] == decay[id(net.b.bias)] == 0.0
    assert isinstance(optimizer, torch.optim.AdamW)
