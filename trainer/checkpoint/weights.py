"""Weights out of a checkpoint (export) and into a new run (fine-tuning), by name."""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from datamodules.store import NotFound, Store
from trainer.checkpoint import loading, safetensors
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint import state as states
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.storage import read_full
from trainer.distributed import on_rank_zero, rank
from trainer.schema import WeightsConfig

NETWORK = "network."  # the network within the task
EMA = "ema."  # averaged weights, see `Checkpointer.register`

log = logging.getLogger("keel.weights")


@dataclass
class Report:
    """What became of the tensors of a source: names of the network, but for `unused`, which are the source's own.

    `other_shape`: name -> [shape in the source, shape in the network].
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    other_shape: dict[str, list[list[int]]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.other_shape or self.unused)

    def __str__(self) -> str:
        shapes = [f"{name} {theirs} (here {ours})" for name, (theirs, ours) in self.other_shape.items()]
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (("not in it", self.missing), ("of another shape", shapes), ("not used", self.unused)):
            if names:
                parts.append(f"{len(names)} {what}: {loading.some(names)}")
        return f"weights from {self.source}: {'; '.join(parts)}"


def starting(
    config: WeightsConfig, store: Store, prepare: Callable[[nn.Module], nn.Module | None]
) -> Callable[[nn.Module], nn.Module | None]:
    """`prepare` of a strategy, after which the network has the weights that the config names; `weights.json` at the run's URL
    tells what was loaded and what was not."""

    def prepared(network: nn.Module) -> nn.Module | None:
        replaced = prepare(network)
        report = load_into(config, network if replaced is None else replaced)
        if rank() == 0:
            store.write("weights.json", json.dumps(asdict(report), indent=1).encode())
        return replaced

    return prepared


def branch_point(config: WeightsConfig, *, global_batch: int, max_steps: int) -> int:
    """The committed step of another run that one with `weights.state` goes on from. Not collective.

    Raises:
        CheckpointError: there is none, it was saved with another batch, or nothing is left to be done after it.
    """
    checkpoints = Store(config.url).sub("checkpoints")
    step = config.step or manifests.latest(checkpoints)
    if step is None:
        raise CheckpointError(f"weights.url={config.url}: no committed checkpoint there")
    manifest = manifests.read_manifest(checkpoints, step)
    batch = manifest["config"]["train"]["global_batch"]
    if batch != global_batch:
        raise CheckpointError(
            f"weights.state: {config.url} was trained with train.global_batch={batch}, not {global_batch}, so that its steps "
            "do not say where in the data it is"
        )
    if step >= max_steps:
        raise CheckpointError(
            f"weights.state: the run goes on from step {step} of {config.url}, but train.max_steps={max_steps}"
        )
    return step


def load_into(config: WeightsConfig, network: nn.Module) -> Report:
    """Fills a network, sharded or not, from a run's checkpoint or a safetensors file. Collective.

    Returns:
        What was loaded; what is not keeps its initial value.

    Raises:
        CheckpointError: the source cannot be read; nothing of it fits; or, with `strict`, not everything does.
    """
    url, table = on_rank_zero(lambda: open_source(config.url, config.step, ema=config.ema))
    renamed = rename(table, config.map, config.url)
    own = {name: value for name, value in get_model_state_dict(network).items() if isinstance(value, torch.Tensor)}
    report = Report(config.url)
    for name, value in own.items():
        if name not in renamed:
            report.missing.append(name)
        elif renamed[name][1]["shape"] != list(value.shape):
            report.other_shape[name] = [renamed[name][1]["shape"], list(value.shape)]
        else:
            report.loaded.append(name)
    report.unused = [saved for name, (saved, _) in renamed.items() if name not in own]
    if not report.loaded:
        raise CheckpointError(f"{report}: nothing fits; rename with weights.map, such as {{'^encoder\\.': ''}}")
    if config.strict and not report.complete:
        raise CheckpointError(
            f"{report}; rename or leave out (a name mapped to '') with weights.map, or set weights.strict=false to start "
            "with what fits"
        )
    entries = {name: renamed[name][1] for name in report.loaded}
    loading.load_tensors(Store(url), entries, {name: own[name] for name in report.loaded})
    if rank() == 0:
        log.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
    return report


def rename(table: Mapping[str, Any], rules: Mapping[str, str], url: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """New name -> (name in the source, entry). The first rule (regular expression -> replacement) that is found in a name
    changes it; a name that becomes empty, or whose rule's replacement is empty, is left out.

    Raises:
        CheckpointError: a rule that is no regular expression, or two tensors that get the same name.
    """
    try:
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules.items()]
    except re.error as error:
        raise CheckpointError(f"weights.map: {error.pattern!r} is not a regular expression: {error}") from error
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for saved, entry in table.items():
        name = saved
        for pattern, replacement in compiled:
            if pattern.search(saved):
                name = pattern.sub(replacement, saved)
                break
        if not name:
            continue
        if name in found:
            raise CheckpointError(f"weights.map gives {saved} and {found[name][0]} of {url} the same name {name}")
        found[name] = saved, entry
    return found


def open_source(url: str, step: int = 0, *, ema: bool = False) -> tuple[str, dict[str, Any]]:
    """(folder, table of the network's tensors) of a run, a `.safetensors` file or its `.index.json`. Not collective.

    Args:
        url: of the run or file.
        step: a committed step of the run (0: the last whole one).
        ema: the averaged weights of the run.

    Raises:
        CheckpointError: there are no such weights.
    """
    base, _, name = url.rpartition("/")
    store = Store(base or ".")
    try:
        if name.endswith(".safetensors"):
            return store.url, safetensors.read_table(store, name)
        if name.endswith(".index.json"):
            table: dict[str, Any] = {}
            for file in sorted(set(store.read_json(name)["weight_map"].values())):
                table.update(safetensors.read_table(store, file))
            return store.url, table
    except NotFound as error:
        raise CheckpointError(f"weights.url={url}: there is no such file") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"weights.url={url}: not an index of safetensors files") from error
    checkpoints = Store(url).sub("checkpoints")
    found = step or manifests.latest(checkpoints)
    if found is None:
        raise CheckpointError(f"weights.url={url}: no committed checkpoint there, and no .safetensors file")
    manifest = manifests.read_manifest(checkpoints, found)
    folder = checkpoints.sub(manifests.step_name(found))
    return folder.url, select(manifest, folder.url, ema=ema)


def select(manifest: Mapping[str, Any], url: str, *, ema: bool = False, everything: bool = False) -> dict[str, Any]:
    """The weights of a manifest under the network's own names.

    Args:
        manifest: of a checkpoint.
        url: for messages.
        ema: averaged ones where there are any (buffers are not averaged).
        everything: also what the task holds beside the network, all under the task's names.

    Raises:
        CheckpointError: it has no averaged weights.
    """
    saved = manifest["tensors"]
    if ema and not any(name.startswith(EMA) for name in saved):
        raise CheckpointError(f"{url} has no averaged weights: its run had train.ema_decay=0")
    prefix = states.MODEL if everything else states.MODEL + NETWORK
    names = [name.removeprefix(states.MODEL) for name in saved if name.startswith(prefix)]
    source = EMA if ema else states.MODEL
    return {
        (name if everything else name.removeprefix(NETWORK)): saved[loading.weights_name(dict(manifest), name, source)]
        for name in names
    }


def export(
    store: Store,
    step: int,
    target: str,
    *,
    ema: bool = False,
    everything: bool = False,
    dtype: str = "",
) -> tuple[int, int]:
    """Writes the weights of a committed step as one safetensors file; (tensors, bytes). One process, not collective.

    Args:
        store: the `checkpoints/` store of a run.
        step: committed.
        target: path or URL of the file.
        ema, everything: as `select`.
        dtype: that of floating-point tensors (empty: as they are).
    """
    manifest = manifests.read_manifest(store, step)
    folder = store.sub(manifests.step_name(step))
    table = select(manifest, folder.url, ema=ema, everything=everything)
    kinds = {name: _converted(entry["dtype"], dtype) for name, entry in table.items()}

    def content(name: str) -> torch.Tensor:
        return read_full(folder, table, [name])[name].to(getattr(torch, kinds[name]))

    about = {"format": "pt", "keel.step": str(step), "keel.source": folder.url, "keel.ema": str(ema).lower()}
    base, _, name = target.rpartition("/")
    listed = {key: (kinds[key], entry["shape"]) for key, entry in table.items()}
    return len(table), safetensors.write(Store(base or "."), name, listed, content, about)


def _converted(kind: str, dtype: str) -> str:
    return dtype if dtype and getattr(torch, kind).is_floating_point else kind


@dataclass(frozen=True)
class Difference:
    """How a tensor differs between two checkpoints: norms over all elements, in float64."""

    name: str
    norm: float
    other_norm: float
    distance: float
    largest: float

    @property
    def relative(self) -> float:
        """Distance over the norm of the first."""
        return self.distance / self.norm if self.norm else (math.inf if self.distance else 0.0)


def difference(
    name: str, first: tuple[Store, Mapping[str, Any]], second: tuple[Store, Mapping[str, Any]]
) -> Difference:
    """Compares one tensor of two checkpoints (folder, manifest's tensors) that has the same shape in both."""
    a, b = (read_full(folder, dict(table), [name])[name] for folder, table in (first, second))
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    gap = (a - b).abs()
    largest = float(gap.max()) if gap.numel() else 0.0
    return Difference(name, float(a.abs().norm()), float(b.abs().norm()), float(gap.norm()), largest)
