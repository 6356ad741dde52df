"""Parametrisations: the rules against their table and PyPI's mup, two forms of one function, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import mup
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modules import scales
from modules.layers.linear import Embedding, Linear
from modules.roles import declare, roles
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text
from trainer import config as configs
from trainer import optim, parametrization
from trainer.build import _task, check, measure, rules
from trainer.config import ConfigError
from trainer.parametrization.horizon import rate_factor
from trainer.parametrization.rule import Case
from trainer.plain import PlainRun, hold
from trainer.strategies import deferred

BASE = {"lm": {"width": 16, "heads": 2}, "fno": {"width": 8}}
WIDE = {"lm": ["model.width=64", "model.heads=4"], "fno": ["model.width=32"]}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}
ADAMW = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"lm": tiny_text(str(folder / "text")), "fno": tiny_fields(str(folder / "fields"))}


def config(kind: str, name: str = "standard", *words: str, data: str = "nowhere", **fields: Any) -> configs.RunConfig:
    raw = {"lm": lm_config, "fno": fno_config}[kind]("unused", data)
    raw["diagnostics"] = {"every": 0, "names": []}
    raw["strategy"] = {"name": "ddp"}
    raw["schedule"] = {"name": "constant"}
    raw["train"]["grad_clip"] = 0.0  # the norm of a gradient depends on the form
    raw["optim"] = fields.pop("optim", ADAMW)
    raw["parametrization"] = {"name": name, **fields}
    return configs.load(raw, words)


def of(made: configs.RunConfig) -> tuple[nn.Module, dict[str, Any]]:
    """(network, rules) of a config."""
    task = _task(made)
    return task.network, rules(made, task)


def by_role(found: dict[str, Any], network: nn.Module, role: str) -> Any:
    """The rule that all tensors of a role share."""
    kinds = {found[name] for name, own in roles(network).items() if own == role}
    assert len(kinds) == 1
    return kinds.pop()


# ------------------------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize(
    ("form", "family", "embedding", "hidden", "readout", "vector"),
    [  # (rate, initial scale over the module's own, factor) at four times the base width
        ("multiplier", ADAMW, (1, 1, 1), (1 / 4, 1, 1), (1, 2, 1 / 4), 1),
        ("multiplier", SGD, (4, 1, 1), (1, 1, 1), (4, 2, 1 / 4), 4),
        ("table", ADAMW, (1, 1, 1), (1 / 4, 1, 1), (1 / 4, 1 / 2, 1), 1),
        ("table", SGD, (4, 1, 1), (1, 1, 1), (1 / 4, 1 / 2, 1), 4),
    ],
)
def test_mup_is_its_table(form, family, embedding, hidden, readout, vector):
    """On an FNO, whose layers start as torch's do: uniform, with a deviation that falls as fan_in^-1/2 by itself."""
    made = config("fno", "mup", *WIDE["fno"], base=BASE["fno"], form=form, optim=family)
    network, found = of(made)
    for role, (rate, start, factor) in {
        "embedding": embedding,
        "hidden": hidden,
        "spectral": hidden,  # its fan-in is its channels
        "readout": readout,
    }.items():
        rule = by_role(found, network, role)
        assert (rule.lr_scale, rule.init_scale, rule.weight_factor) == pytest.approx((rate, start, factor)), role
        assert rule.lr_scale * rule.decay_scale == pytest.approx(1)  # what a step takes off is the same everywhere
    gains = {found[name].lr_scale for name, p in network.named_parameters() if p.shape == (32,)}
    assert gains == {vector} and found["projection.down.bias"].lr_scale == 1
    assert all(found[name].decay_scale == 0 for name, role in roles(network).items() if role == "vector")


def test_modes_and_resolution_are_no_width():
    few, many = (
        of(config("fno", "mup", *WIDE["fno"], f"model.modes={m}", base=BASE["fno"]))[1] for m in ([2, 2], [6, 6])
    )
    assert few == many


def test_weight_decay_and_epsilon():
    for decay, expected in (("constant", 4.0), ("with_rate", 1.0), ("independent", 4.0 / ADAMW["lr"])):
        found = of(config("lm", "mup", *WIDE["lm"], base=BASE["lm"], decay=decay))[1]
        assert found["layers.0.attention.query.weight"].decay_scale == pytest.approx(expected)
        assert found["layers.0.attention.query.weight"].eps_scale == pytest.approx(1 / 4)
    found = of(config("lm", "mup", *WIDE["lm"], base=BASE["lm"], scale_epsilon=False))[1]
    assert {rule.eps_scale for rule in found.values()} == {1.0}


def test_independent_decay_takes_the_same_part_whatever_the_rate(data):
    """theta <- theta (1 - schedule * weight_decay) without a gradient (arXiv:2309.14322)."""
    for rate in (0.01, 0.1):
        made = config(
            "lm", "mup", *WIDE["lm"], data=data["lm"], base=BASE["lm"], decay="independent", optim={**ADAMW, "lr": rate}
        )
        run = PlainRun(made)
        weight = run.task.network.get_parameter("layers.0.attention.query.weight")
        before = weight.detach().clone()
        for parameter in run.task.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        torch.testing.assert_close(weight.detach(), before * (1 - ADAMW["weight_decay"]))


def test_depth_rule_and_law_multiply_onto_the_rest():
    part = {"base": {"width": 16, "depth": 2}, "base_data": 256.0, "base_batch": 64.0}
    words = ["model.width=32", "model.depth=8", "train.max_steps=16", "train.global_batch=4"]
    network, found = of(config("lm", "mup+depth+horizon", *words, **part))
    law = (16 * 4 * 32 / 256) ** -0.32 * (4 * 32 / 64) ** 0.5
    assert found["embedding.weight"].lr_scale == pytest.approx(law)
    assert found["layers.7.attention.out.weight"].lr_scale == pytest.approx(law / 2 / 2)  # width, depth^-1/2
    assert found["layers.7.attention.out.weight"].init_scale == pytest.approx(2)  # as in the base model: 1/sqrt(2 L0)
    assert found["layers.7.attention.out.weight"].decay_scale == pytest.approx(4)  # decay follows the law's rate
    assert found["layers.0.mlp_norm.weight"].lr_scale == pytest.approx(law / 2)
    blocks = network.blocks()
    assert [scales.factor(block, "branch") for block in blocks] == [0.5] * 8
    complete = of(config("lm", "mup+depth", *words[:2], base=part["base"], branch_exponent=1.0))
    assert scales.factor(complete[0].blocks()[0], "branch") == 0.25
    assert complete[1]["layers.0.attention.out.weight"].lr_scale == pytest.approx(1 / 2)
    # SGD needs no rule at depth^-1/2: the branch's gradient has it already
    sgd = of(config("lm", "mup+depth", *words[:2], base=part["base"], optim=SGD))[1]
    assert sgd["layers.0.attention.out.weight"].lr_scale == pytest.approx(1)


def test_published_rates_of_a_law_over_depth_horizon_and_batch():
    """ArchScale's rates at 16 to 24 blocks, and 50 tokens per parameter (arXiv:2603.28743)."""
    tokens = {8: 10.4e9, 12: 28.489e9, 16: 61.876e9, 20: 115.592e9, 24: 194.665994962e9}
    golden = {8: 1.6e-2, 12: 9.463e-3, 16: 6.3939e-3, 20: 4.6823e-3, 24: 3.6177e-3}
    for depth, expected in golden.items():
        horizon, batch = rate_factor(tokens[depth] / tokens[8], 1.0)
        assert 0.016 * math.sqrt(8 / depth) * horizon * batch == pytest.approx(expected, rel=1e-4)
    assert rate_factor(1.0, 4.0) == (1.0, 2.0)


def test_attention_scores_fall_with_features_not_their_root():
    network = of(config("lm", "mup", *WIDE["lm"], base=BASE["lm"], attention_multiplier=3.0))[0]
    attention = network.blocks()[0].attention
    assert attention.head_dim == 16 and scales.factor(attention, "attention") == pytest.approx(3 * 8**0.5 / 16)


def test_ntk_starts_as_the_standard_network_of_its_width_and_shrinks_its_steps():
    made = config("fno", "ntk", *WIDE["fno"], base=BASE["fno"])
    torch.manual_seed(0)
    network, found = of(made)
    torch.manual_seed(0)
    plain = of(config("fno", "standard", *WIDE["fno"]))[0]
    for name, parameter in network.named_parameters():
        if roles(network)[name] != "vector":
            rule = found[name]
            torch.testing.assert_close(parameter * rule.weight_factor, plain.get_parameter(name))
    assert by_role(found, network, "spectral").lr_scale == 0.5 and by_role(found, network, "embedding").lr_scale == 1
    sgd = of(config("fno", "ntk", *WIDE["fno"], base=BASE["fno"], optim=SGD))[1]
    assert {rule.lr_scale for rule in sgd.values()} == {1.0}


# ---------------------------------------------------------------------------------------------------------- PyPI's mup
@pytest.mark.parametrize("family", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["lm", "fno"])
def test_groups_are_those_of_mup(kind, family):
    """The same rate and decay for every parameter of the real networks (vectors are decayed there, too)."""
    made = config(kind, "mup", *WIDE[kind], base=BASE[kind], optim=family, decay_vectors=True, scale_epsilon=False)
    network, found = of(made)
    ours = parametrization.groups(
        dict(network.named_parameters()), found, lr=family["lr"], weight_decay=family["weight_decay"]
    )
    mine = {id(p): (g["lr"], g["weight_decay"]) for g in ours for p in g["params"]}
    base, delta = (of(config(kind, "standard", f"model.width={w}", *heads))[0] for w, heads in _narrow(kind))
    mup.set_base_shapes(network, base, delta=delta, rescale_params=False, do_assert=False)
    make = mup.MuAdamW if family is ADAMW else mup.MuSGD
    theirs = make(network.parameters(), lr=family["lr"], weight_decay=family["weight_decay"])
    names = {id(p): name for name, p in network.named_parameters()}
    for group in theirs.param_groups:
        for p in group["params"]:
            assert mine[id(p)] == pytest.approx((group["lr"], group["weight_decay"])), names[id(p)]
    assert len(names) == len(mine) == sum(len(g["params"]) for g in theirs.param_groups)


def _narrow(kind: str) -> list[tuple[int, list[str]]]:
    return [(16, ["model.heads=2"]), (32, ["model.heads=2"])] if kind == "lm" else [(8, []), (16, [])]


class Ours(nn.Module):
    """A token network of Keel's layers, the middle one as torch starts it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = Embedding(50, width, std=1.0)
        self.up = Linear(width, 4 * width, bias=True)
        self.down = Linear(4 * width, width, std=0.5 / math.sqrt(4 * width))
        self.readout = Linear(width, 50, role="readout")

    def blocks(self) -> list[nn.Module]:
        return [self.up]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(F.relu(self.down(F.relu(self.up(self.embedding(x))))))


class Theirs(nn.Module):
    """The same of torch's layers and mup's readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.readout = mup.MuReadout(width, 50, bias=False, output_mult=3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(F.relu(self.down(F.relu(self.up(self.embedding(x))))))


def test_initial_scales_and_readout_are_those_of_mup():
    torch.manual_seed(0)
    theirs = Theirs(512)
    mup.set_base_shapes(theirs, Theirs(32), delta=Theirs(64))
    mup.init.normal_(theirs.embedding.weight)
    mup.init.normal_(theirs.down.weight, std=0.5 / math.sqrt(4 * 32))
    ours, base = Ours(512), Ours(32)
    config_class, make = parametrization.lookup("mup")
    scheme = make(config_class(base={"width": 32}, output_multiplier=3.0))
    scheme.apply(ours, base, Case("adam", 0.01))
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).std(), parameter.std(), rtol=0.03, atol=0, msg=name)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randint(50, (4, 7))
    torch.testing.assert_close(ours(x), theirs(x))


# -------------------------------------------------------------------------------------------------- one function, twice
def losses(made: configs.RunConfig, batch: dict[str, torch.Tensor], steps: int = 5) -> list[float]:
    run = PlainRun(made)
    run.task.double()
    wide = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    return [run.step(wide) for _ in range(steps)]


@pytest.mark.parametrize("family", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["lm", "fno"])
def test_table_and_multiplier_train_one_function(kind, family, data):
    """In float64, to rounding: initial values, rates, decay and epsilon all change with the readout's multiplier."""
    large = {**family, "eps": 1e-3} if family is ADAMW else family  # an epsilon that is felt
    made = [
        config(
            kind, "mup", *WIDE[kind], data=data[kind], base=BASE[kind], form=form, optim=large, output_multiplier=2.0
        )
        for form in ("table", "multiplier")
    ]
    batch = hold(made[0], "train", 4)
    table, multiplier = (losses(one, batch) for one in made)
    np.testing.assert_allclose(table, multiplier, rtol=1e-12)
    plain = losses(config(kind, "standard", *WIDE[kind], data=data[kind], optim=large), batch)
    assert abs(plain[-1] / table[-1] - 1) > 1e-3


@pytest.mark.parametrize("kind", ["lm", "fno"])
@pytest.mark.parametrize("name", ["mup", "ntk"])
def test_at_the_base_width_it_is_the_standard_parametrisation_bit_for_bit(kind, name, data):
    batch = hold(config(kind, data=data[kind]), "train", 4)
    fields = {"base": BASE[kind]} if name == "ntk" else {"base": BASE[kind], "form": "table"}
    runs = [
        PlainRun(config(kind, *other, data=data[kind], **more)) for *other, more in (("standard", {}), (name, fields))
    ]
    assert [run.step(batch) for run in runs[:1] for _ in range(3)] == [
        run.step(batch) for run in runs[1:] for _ in range(3)
    ]


def test_initial_values_are_replayed_where_the_network_is_never_whole():
    """Also where the scaling is by zero. Under two processes: `test_sharding`."""
    for more in ({}, {"zero_readout": True}):
        made = config("lm", "mup+depth", *WIDE["lm"], "model.depth=4", base={**BASE["lm"], "depth": 2}, **more)
        torch.manual_seed(5)
        whole = _task(made).network
        torch.manual_seed(5)
        late = _task(made, deferred.record).network
        assert all(parameter.is_meta for parameter in late.parameters())
        deferred.replay(late, torch.device("cpu"))
        for name, parameter in whole.named_parameters():
            assert torch.equal(parameter, late.get_parameter(name)), name
        assert scales.factor(late.readout, "weight") == 0.25
        assert bool((whole.readout.weight == 0).all()) == bool(more)


def test_a_tied_table_is_read_as_an_embedding_and_scored_as_a_readout():
    words = [*WIDE["lm"], "model.tie_embeddings=true"]
    network, found = of(config("lm", "mup", *words, base=BASE["lm"], output_multiplier=2.0, embedding_multiplier=5.0))
    assert scales.factors(network.embedding) == {"weight": 5.0, "score": 0.5}
    assert found["embedding.weight"].lr_scale == 1
    for more in ({"form": "table"}, {"zero_readout": True}):
        with pytest.raises(ConfigError, match=next(iter(more))):
            config("lm", "mup", *words, base=BASE["lm"], **more)


def test_without_a_base_model_nothing_changes():
    found = of(config("lm"))[1]
    assert {(r.lr_scale, r.eps_scale, r.init_scale, r.weight_factor) for r in found.values()} == {(1.0, 1.0, 1.0, 1.0)}
    assert measure(config("lm", "mup", base=BASE["lm"])) == measure(config("lm"))


# ----------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("kind", "name", "fields", "message"),
    [
        ("lm", "mup", {}, "base: give the fields of the base model"),
        ("lm", "mup", {"base": {"widht": 8}}, r"unknown key 'parametrization.base.widht': did you mean"),
        ("lm", "mup", {"base": {"width": 7}}, "heads=2: does not divide width=7"),
        ("lm", "mup", {"base": {"depth": 1}}, r"use parametrization.name=mup\+depth"),
        ("lm", "mup", {"base": {"width": 8}, "form": "tabel"}, "form=tabel: choose one of multiplier, table"),
        ("lm", "mup", {"base": {"width": 8}, "decay": "no"}, "decay=no: choose one of"),
        ("lm", "mup", {"base": {"width": 8}, "output_multiplier": 0.0}, "output_multiplier=0.0: must be greater"),
        ("lm", "mup+ntk", {"base": {"width": 8}}, "more than one width rule"),
        ("lm", "depth", {"base": {"depth": 1}}, r"such as mup\+depth"),
        ("lm", "mup+dept", {"base": {"depth": 1}}, "did you mean depth"),
        (
            "lm",
            "mup+depth",
            {"base": {"depth": 1}, "branch_exponent": 0.2},
            r"branch_exponent=0.2: must lie in \[0.5, 1\]",
        ),
        ("fno", "mup+depth", {"base": {"depth": 1}}, "FNO declares no residual branches"),
        ("lm", "horizon", {"base_batch": 1.0}, "base_data=0.0: must be greater than 0"),
        ("lm", "standard", {"base": {"width": 8}}, "unknown key 'parametrization.base'"),
        ("lm", "mup", {"base": {"width": 8}, "optim": {"name": "muon"}}, "has rules for adamw and sgd"),
    ],
)
def test_what_has_no_rule_is_refused_with_a_sentence(kind, name, fields, message):
    with pytest.raises(ConfigError, match=message):
        check(config(kind, name, **fields))


def test_a_module_without_fans_is_named():
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.block = nn.Identity()
            self.weight = nn.Parameter(torch.zeros(width, width))
            declare(self, weight="hidden")

        def blocks(self) -> list[nn.Module]:
            return [self.block]

    config_class, make = parametrization.lookup("mup")
    with pytest.raises(ValueError, match="weight: Net declares no fans"):
        make(config_class(base={"width": 2})).rules(Net(4), Net(2), Case("adam", 0.1))
    assert optim.lookup("adamw")[1].family == "adam" and optim.lookup("muon")[1].family == "matrix"
