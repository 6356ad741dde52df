"""What a config can name: one line per kind of data set that is streamed, one line per generator that writes one,
one line per layout that is imported.

A line maps a name to `package.module:Class`, imported when it is looked up; the class attribute `config_class` is its
config dataclass.
"""

import difflib
import importlib
from typing import Any, Literal

DATA: dict[str, str] = {
    "fields": "datamodules.data:FieldsData",
    "mixture": "datamodules.mixture:MixtureData",
    "text": "datamodules.data:TextData",
}

GENERATORS: dict[str, str] = {
    "advection_1d": "datamodules.simulators.advection_1d:Advection1D",
    "burgers_1d": "datamodules.simulators.burgers_1d:Burgers1D",
    "compressible_flow_2d": "datamodules.simulators.compressible_flow_2d:CompressibleFlow2D",
    "darcy_2d": "datamodules.simulators.darcy_2d:Darcy2D",
    "korteweg_de_vries_1d": "datamodules.simulators.korteweg_de_vries_1d:KortewegDeVries1D",
    "kuramoto_sivashinsky_1d": "datamodules.simulators.kuramoto_sivashinsky_1d:KuramotoSivashinsky1D",
    "reaction_diffusion_2d": "datamodules.simulators.reaction_diffusion_2d:ReactionDiffusion2D",
    "shallow_water_2d": "datamodules.simulators.shallow_water_2d:ShallowWater2D",
    "wave_1d": "datamodules.simulators.wave_1d:Wave1D",
    "lorenz63": "datamodules.simulators.lorenz63:Lorenz63",
    "lorenz96": "datamodules.simulators.lorenz96:Lorenz96",
    "rossler": "datamodules.simulators.rossler:Rossler",
    "double_pendulum": "datamodules.simulators.double_pendulum:DoublePendulum",
    "skew_product": "datamodules.simulators.skew_product:SkewProduct",
    "chialvo_ring_star": "datamodules.simulators.chialvo_ring_star:ChialvoRingStar",
    "chialvo_rulkov": "datamodules.simulators.chialvo_rulkov:ChialvoRulkov",
    "dyadic_shell": "datamodules.simulators.dyadic_shell:DyadicShell",
    "dysts": "datamodules.simulators.dysts_system:DystsSystem",
    "navier_stokes_2d": "datamodules.simulators.navier_stokes_2d:NavierStokes2D",
    "stdlib_text": "datamodules.text:StdlibText",
    "text_files": "datamodules.text_files:TextFiles",
}

IMPORTERS: dict[str, str] = {
    "netcdf": "datamodules.importers.xarray_data:XarrayData",
    "npy": "datamodules.importers.npy:Npy",
    "pdebench": "datamodules.importers.pdebench:PDEBench",
    "well": "datamodules.importers.well:Well",
}

_TABLES = {"data": DATA, "generator": GENERATORS, "importer": IMPORTERS}


def lookup(kind: Literal["data", "generator", "importer"], name: str) -> tuple[type[Any], type[Any]]:
    """The (config dataclass, class) registered under `name`. Raises ValueError naming the nearest valid names."""
    table = _TABLES[kind]
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(table))}"
        raise ValueError(f"{kind}.name={name}: no such {kind}; {hint}")
    module, _, attribute = table[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    return cls.config_class, cls


def names(kind: Literal["data", "generator", "importer"]) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(_TABLES[kind])
