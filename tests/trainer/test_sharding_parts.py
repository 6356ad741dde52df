"""The parts of sharding that one process shows: deferred initialisation, recomputation, precision, what is refused."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modules.language.transformer import Transformer, TransformerConfig
from modules.operators.fno import FNO, FNOConfig
from modules.tensor_plan import TensorPlan
from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text
from trainer import config as configs
from trainer.flops import count_operations
from trainer.strategies import blocks, deferred, precision, tensor_parallel
from trainer.strategies.mesh import Layout


class LiveBytes(TorchDispatchMode):
    """Bytes on the CPU that operations have allocated and that are alive: `now`, and the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def network(kind: str, depth: int = 2) -> Any:
    torch.manual_seed(3)
    if kind == "lm":
        return Transformer(TransformerConfig(width=32, heads=2, depth=depth, bias=True))
    return FNO(FNOConfig(width=8, modes=[6, 6], depth=depth, norm="group"))


def batch(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "lm":
        return torch.randint(0, 256, (4, 32), generator=generator)
    return torch.randn(4, 1, 16, 16, generator=generator)


@pytest.mark.parametrize("kind", ["lm", "fno"])
def test_a_deferred_network_holds_one_whole_parameter_at_a_time(kind):
    whole = network(kind)
    torch.manual_seed(3)
    waiting = deferred.record(lambda: type(whole)(whole.config))
    assert deferred.is_recorded(waiting) and all(p.is_meta for p in waiting.parameters())
    torch.manual_seed(99)  # what happens in between does not matter
    before = torch.get_rng_state()
    with LiveBytes() as live:
        deferred.replay(waiting, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    plain = dict(whole.named_parameters())
    assert all(torch.equal(p, plain[name]) for name, p in waiting.named_parameters())
    sizes = [p.numel() * 4 for p in plain.values()]
    assert sum(sizes) < live.peak <= sum(sizes) + max(sizes) + 10_000  # 10 kB: the generator's state


class Unusual(nn.Module):
    """Initialised by more than in-place operations."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4).normal_() if buffer else torch.randn(4, 4))
        if buffer:
            self.register_buffer("table", torch.arange(3.0))


@pytest.mark.parametrize("buffer", [False, True])
def test_a_network_that_cannot_be_deferred_is_built_whole_and_says_so(buffer, caplog):
    torch.manual_seed(5)
    plain = Unusual(buffer)
    torch.manual_seed(5)
    with caplog.at_level("INFO", logger="keel.run"):
        made = deferred.record(lambda: Unusual(buffer))
    assert torch.equal(made.weight, plain.weight) and not deferred.is_recorded(made)
    assert "built whole" in caplog.text


@pytest.mark.parametrize("kind", ["lm", "fno"])
def test_recomputation_saves_memory_and_changes_no_bit(kind):
    kept, operations, gradients = {}, {}, {}
    for how in ("none", "selective", "block"):
        net = network(kind, depth=4)
        blocks.apply(net, compiled=False, activation_checkpointing=how)
        gc.collect()
        with LiveBytes() as live:
            loss = net(batch(kind)).square().mean()
            kept[how] = live.now
        loss.backward()
        gradients[how] = {name: p.grad for name, p in net.named_parameters()}
        meta = network(kind, depth=4).to("meta")
        blocks.apply(meta, compiled=False, activation_checkpointing=how)
        operations[how] = count_operations(lambda m=meta: m(batch(kind).to("meta")).square().mean().backward())
    for how in ("selective", "block"):
        assert all(torch.equal(gradients["none"][n], g) for n, g in gradients[how].items())
    assert kept["block"] < 0.5 * kept["none"] and kept["block"] < kept["selective"] < 0.85 * kept["none"]
    assert operations["none"] <= operations["selective"] < operations["block"]


def test_names_and_hooks_survive_recomputation_and_compilation():
    net = network("lm")
    names = list(net.state_dict())
    blocks.apply(net, compiled=True, activation_checkpointing="block")
    assert list(net.state_dict()) == names


@pytest.mark.parametrize("kind", ["lm", "fno"])
def test_transforms_and_norms_stay_in_float32(kind, monkeypatch):
    """Under every precision; the lower one is used between them."""
    seen: dict[str, set[torch.dtype]] = {}
    for name in ("rfft", "fft", "ifft", "irfft"):
        real = getattr(torch.fft, name)
        monkeypatch.setattr(torch.fft, name, lambda x, *a, real=real, **k: seen["fft"].add(x.dtype) or real(x, *a, **k))
    for name in ("rms_norm", "group_norm"):
        real = getattr(nn.functional, name)
        wrapped = lambda x, *a, real=real, **k: seen["norm"].add(x.dtype) or real(x, *a, **k)  # noqa: E731
        monkeypatch.setattr(nn.functional, name, wrapped)
    for how, dtype in (("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16), ("bf16-true", torch.bfloat16)):
        seen.update(fft=set(), norm=set())
        net = network(kind)
        precision.cast_weights(net, how)
        products = []
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, i, o, seen=products: seen.append(o.dtype))
        with precision.compute(how, "cpu"):
            net(batch(kind)).float().mean().backward()
        assert seen["norm"] == {torch.float32}
        assert seen["fft"] <= {torch.float32, torch.complex64} and (kind == "lm" or seen["fft"])
        assert set(products) == {dtype}
        assert {p.grad.dtype for p in net.parameters()} == {torch.bfloat16 if how == "bf16-true" else torch.float32}


def test_the_scaler_is_part_of_the_precisions_state():
    plugin = precision.plugin("16-mixed", "cpu")
    scale = plugin.scaler.scale(torch.ones(())).item()
    plugin.scaler.update(scale / 4)
    again = precision.plugin("16-mixed", "cpu")
    again.load_state_dict(plugin.state_dict())
    assert again.scaler.scale(torch.ones(())).item() == scale / 4
    assert precision.plugin("bf16-mixed", "cpu").state_dict() == {}


def test_a_layout_puts_tensor_parallel_ranks_side_by_side():
    layout = Layout(16, replicate=2, tensor=4)
    assert (layout.shard, layout.data_parallel) == (2, 4)
    assert [layout.data_rank(rank) for rank in range(16)] == [rank // 4 for rank in range(16)]
    with pytest.raises(ValueError, match=r"strategy\.replicate=3 x strategy\.tensor=1 does not divide 4 ranks"):
        Layout(4, replicate=3)


def test_a_plan_that_forgets_a_module_is_refused(monkeypatch):
    monkeypatch.setattr(Transformer, "tensor_plan", lambda self: TensorPlan({"embedding": "gather"}))
    with pytest.raises(ValueError, match=r"plan of Transformer does not cover layers\.0\.attention_norm"):
        tensor_parallel.check(network("lm"), 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"fno": tiny_fields(str(folder / "fields")), "lm": tiny_text(str(folder / "text"))}


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (
            "fno",
            ["strategy.tensor=2"],
            r"strategy\.tensor=2: FNO declares no tensor-parallel plan; use strategy\.tensor=1",
        ),
        ("lm", ["strategy.tensor=4"], r"strategy\.tensor=4: does not divide heads=2 of the Transformer"),
        ("lm", ["strategy.tensor=3"], r"strategy\.tensor=3 x strategy\.replicate=1 does not divide .* = 4 processes"),
        ("lm", ["strategy.replicate=4", "strategy.tensor=2"], r"tensor=2 x strategy\.replicate=4 does not divide"),
        ("lm", ["strategy.sharding=half"], r"sharding=half: must be one of full_shard, shard_grad_op"),
        ("lm", ["strategy.tensor=0"], r"tensor=0: must be at least 1"),
        (
            "lm",
            ["train.precision=16-true"],
            r"precision=16-true: must be one of 32-true, bf16-mixed, bf16-true, 16-mixed",
        ),
        ("lm", ["train.activation_checkpointing=all"], r"activation_checkpointing=all: must be one of none, block"),
        (
            "lm",
            ["strategy.tensor=2", "train.global_batch=5"],
            r"does not divide over .* / strategy\.tensor = 2 processes",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(data, kind, overrides, message):
    make = {"fno": fno_config, "lm": lm_config}[kind]
    with pytest.raises(configs.ConfigError, match=message) as error:
        configs.load(make("unused", data[kind]), ["resources.processes_per_node=4", *overrides])
    assert "\n" not in str(error.value)


def test_batches_are_counted_per_group_of_tensor_parallel_ranks(data):
    overrides = ["resources.processes_per_node=4", "strategy.tensor=2", "train.global_batch=6", "train.micro_batch=1"]
    config = configs.load(lm_config("unused", data["lm"]), [*overrides, "train.precision=32"])
    assert (config.data_parallel, config.accumulation, config.train.precision) == (2, 3, "32-true")
