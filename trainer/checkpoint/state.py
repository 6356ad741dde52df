"""The state of a run as flat tensors and scalars, under parameter names: independent of world size and strategy."""

import json
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_RNG_BYTES = 16 << 10
MODEL, OPTIMIZER, RNG = "model.", "optimizer.", "rng."
# Settings of an optimiser's groups that say how it computes here, not what: those of the running one hold.
_EXECUTION = ("capturable", "differentiable", "foreach", "fused")


def collect(
    module: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, scalars) of a module and its optimisers; tensors are the live ones (DTensors where sharded).

    An optimiser with an attribute `named_state` (ZeRO, whose buffers have no names) is asked instead.

    All ranks must call it.
    """
    if (own := _named_state(optimizers)) is not None:
        return own.collect(module)
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    flat: dict[str, Any] = {MODEL + name: value for name, value in get_model_state_dict(module).items()}
    for index, optimizer in enumerate(optimizers):
        state = get_optimizer_state_dict(module, optimizer, options=_FLAT)
        flat.update({f"{OPTIMIZER}{index}.{name}": value for name, value in state.items()})
    for name, value in flat.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            scalars[name] = list(value) if isinstance(value, tuple) else value
    return tensors, scalars


def restore(
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    tensors: dict[str, torch.Tensor],
    scalars: dict[str, Any],
) -> None:
    """Puts back what `collect` gave, after `tensors` were filled from storage. All ranks must call it."""
    if (own := _named_state(optimizers)) is not None:
        own.restore(module, scalars)
        return
    flat: dict[str, Any] = {**tensors, **{k: tuple(v) if isinstance(v, list) else v for k, v in scalars.items()}}
    set_model_state_dict(module, {k.removeprefix(MODEL): v for k, v in flat.items() if k.startswith(MODEL)})
    for index, optimizer in enumerate(optimizers):
        prefix = f"{OPTIMIZER}{index}."
        state = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
        set_optimizer_state_dict(module, optimizer, state, options=_FLAT)


def is_state(name: str) -> bool:
    """Whether a scalar is state; otherwise it depends on the device and on who watches the run."""
    return name.rpartition(".")[2] not in _EXECUTION


def is_setting(name: str) -> bool:
    """Whether a scalar comes from the config (a rate, a decay) rather than from training."""
    return ".param_groups." in name


def _named_state(optimizers: list[torch.optim.Optimizer]) -> Any:
    return getattr(optimizers[0], "named_state", None) if optimizers else None


def rng_state(device: torch.device) -> torch.Tensor:
    """The generators of this process (torch on CPU and `device`, numpy, python) as one uint8 tensor of JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state(device).numpy()).hex() if device.type == "cuda" else None,
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    packed = json.dumps(state).encode()
    packed += b" " * (-len(packed) % _RNG_BYTES)  # of one size, so that the plan of a save holds for the next
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def set_rng_state(packed: torch.Tensor, device: torch.device) -> None:
    """Puts back what `rng_state` gave."""
    state = json.loads(bytes(packed.numpy()))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8), device)
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
