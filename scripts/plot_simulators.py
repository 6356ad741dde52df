"""Draws one sample of every simulator and writes the page about them.

    python scripts/plot_simulators.py                  # all of them, about a minute
    python scripts/plot_simulators.py wave_1d rossler  # these pictures alone, and the page

A new generator of `datamodules/registry.py` appears by itself, with its defaults; SAMPLES has what else it should be drawn with.
"""

from __future__ import annotations

import argparse
import inspect
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.report.sample import draw_sample
from datamodules.format import Dataset
from datamodules.make import MakeConfig, generator_of, make
from datamodules.registry import GENERATORS, lookup
from datamodules.simulators.fields import Simulation

MOST_BYTES = 100_000
OPTIONAL = {"dysts"}  # needs a package of that name

# Picture -> generator and config: other than the defaults, but one trajectory for all.
SAMPLES: dict[str, dict[str, Any]] = {
    "advection_1d": {"frames": 101, "dt_save": 0.02},
    "burgers_1d": {"viscosity": [5e-3, 5e-3], "frames": 101, "dt_save": 0.02},
    "kuramoto_sivashinsky_1d": {"frames": 201},
    "korteweg_de_vries_1d": {},
    "wave_1d": {"frames": 161, "dt_save": 0.1},
    "navier_stokes_2d": {"resolution": 128, "dt_save": 4.0, "frames": 6, "burn_in": 2.0},
    "decaying_navier_stokes_2d": {
        "name": "navier_stokes_2d",
        "forcing": "none",
        "resolution": 128,
        "viscosity": 1e-4,
        "tau": 20.0,
        "alpha": 2.5,
        "dt_save": 4.0,
        "frames": 6,
    },
    "darcy_2d": {"resolution": 129},
    "reaction_diffusion_2d": {"arms": [2, 2], "dt_save": 8.0, "frames": 6},
    "many_armed_reaction_diffusion_2d": {
        "name": "reaction_diffusion_2d",
        "length": 50.0,
        "diffusion_u": [0.03, 0.03],
        "diffusion_v": [0.2, 0.2],
        "beta": [0.65, 0.65],
        "arms": [4, 4],
        "dt": 0.1,
        "dt_save": 40.0,
        "frames": 6,
    },
    "shallow_water_2d": {"dt_save": 0.2, "frames": 6},
    "compressible_flow_2d": {
        "mach": [1.0, 1.0],
        "density": [1.0, 1.0],
        "temperature": [1.0, 1.0],
        "frames": 6,
        "dt_save": 0.1,
    },
    "lorenz63": {"dt_save": 0.04},
    "lorenz96": {"frames": 256},
    "rossler": {"dt_save": 0.2},
    "double_pendulum": {"frames": 256},
    "skew_product": {"train": 4, "batch": 4},
    "chialvo_ring_star": {"frames": 256},
    "chialvo_rulkov": {"frames": 256},
    "dyadic_shell": {},
}

# Generator -> what its solver is tested against.
TESTED = {
    "advection_1d": "a shifted closed form, to rounding",
    "burgers_1d": "the Cole-Hopf solution at order 4; the mean; energy lost at `-viscosity mean u_x^2`",
    "kuramoto_sivashinsky_1d": "order 4; the mean; growth `k^2 - k^4` of small waves; rms and largest Lyapunov exponent",
    "korteweg_de_vries_1d": "solitons at order 4; mass, momentum and energy",
    "wave_1d": "d'Alembert's solution with all three boundaries; energy within 1e-3; order 4",
    "navier_stokes_2d": "the Taylor-Green vortex; enstrophy lost at `-2 viscosity palinstrophy`; energy and enstrophy of "
    "convection; the laminar Kolmogorov flow and its balance of enstrophy; order",
    "darcy_2d": "a manufactured solution at order 2; residual below 1e-10; positive pressure; iterations free of resolution",
    "reaction_diffusion_2d": "plane waves and the limit cycle at order 4; boundedness",
    "shallow_water_2d": "Stoker's dam break; a simple wave at order 2; mass within 1e-12; symmetry",
    "compressible_flow_2d": "Sod's tube and two others against the exact Riemann solution; a wave of density at order 2; mass, "
    "momentum and energy to rounding; viscous decay of shear and of sound; entropy",
    "lorenz63": "fixed points, eigenvalues, symmetry; largest Lyapunov exponent 0.906 within 3 %; RK4 against DOPRI5",
    "lorenz96": "eigenvalues at rest; energy of products and coupling; largest Lyapunov exponents at K = 40 and 20 within 3 %",
    "rossler": "fixed points; largest Lyapunov exponent 0.0714 within 6 %",
    "double_pendulum": "the Euler-Lagrange equations by automatic differentiation; energy at order 4; small oscillations",
    "skew_product": "base flows and coupling by hand; a driver that runs by itself; selection against tori and decay",
    "chialvo_ring_star": "eigenvalues by modes of the coupling; symmetry of the ring; the synchronous state; chaos of one neuron",
    "chialvo_rulkov": "both maps and the chain by hand; the chain read backwards; fixed point and eigenvalues",
    "dyadic_shell": "energy at order 4 without noise and of each path with transport noise; Ito's balance with additive noise; "
    "exact Ornstein-Uhlenbeck limit; Ito drift of transport noise; order 2",
}

HEAD = """# Simulators

Every generator solves in float64 and writes float32 shards; trajectory i depends on the config, the seed and i alone. Make a
data set with `keel data make configs/data/<name>.yaml`; ranges such as `viscosity: [0.001, 0.1]` are drawn anew for each
trajectory and stored in an array of that name. The pictures and all figures here come from a CPU.

## On a GPU

`generator.device=cuda` runs the same torch code on a GPU (all but `dysts`, whose solvers are of NumPy); `cuda:1` is the
second one. Trajectories are solved `generator.batch` at a time and a step launches the same kernels for one trajectory as for
many, so set `batch` far above its default of 8 to 64, which is for a CPU, as far as the trajectories fit; too many end in one
line that says so. A group is solved as a whole: choose `train`, `validation`, `test` and `shard_bytes` such that groups are
full and a shard holds whole ones. `workers: 0` is right for one GPU; with `device: cuda` and as many workers as there are
GPUs each worker takes one. Random numbers are drawn by NumPy and are the same everywhere, while the last bits of a solution
depend on device and `batch`, which are part of a data set's identity: chaotic trajectories of two devices part after a while.
What an H200 gave beside the CPU is in [results/gpu_data.md](results/gpu_data.md), by `make gpu-check`. Without a GPU it is tested that solvers keep their tensors on the device (where they look at their data, as the finite
volumes, Darcy's iterations, the maps and the skew product do, that their parts keep them), and that no step of an ODE, map,
shell model or skew product copies from the host; DOPRI5 and the finite volumes look at their data each step, to see whether
they are done.

This page and its pictures are written by `python scripts/plot_simulators.py`.
"""


def simulators() -> list[str]:
    """Generators that simulate something, those of fields first, each where SAMPLES or the registry has it."""
    known = [
        name for name in GENERATORS if issubclass(lookup("generator", name)[1], Simulation) and name not in OPTIONAL
    ]
    drawn = [str(given.get("name", picture)) for picture, given in SAMPLES.items()]
    return [*dict.fromkeys(drawn), *(name for name in known if name not in drawn)]


def samples() -> dict[str, dict[str, Any]]:
    """Picture -> config of its generator, `name` included."""
    given = {**SAMPLES, **{name: {} for name in simulators() if name not in SAMPLES}}
    one = {"train": 1, "validation": 0, "test": 0, "batch": 1}
    return {picture: {"name": picture, **one, **config} for picture, config in given.items()}


def draw(picture: str, config: dict[str, Any]) -> bytes:
    """A PNG of MOST_BYTES at most, in a palette of 256 colours."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = Dataset.open(make(MakeConfig(url=folder, generator=config, seed=1)))
        for dpi in (80, 70, 60, 50, 40):
            out, whole = io.BytesIO(), Image.open(io.BytesIO(draw_sample(dataset, title=picture, dpi=dpi)))
            # The palette that reaches farthest keeps rare colours, which are the extremes, and the order of the scale.
            small = whole.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            small.save(out, "png", optimize=True)
            if out.tell() <= MOST_BYTES:
                return out.getvalue()
    raise SystemExit(f"{picture}: {out.tell()} bytes at {dpi} dpi; draw fewer frames or channels")


def section(name: str) -> str:
    """What the page says about a generator."""
    module = sys.modules[lookup("generator", name)[1].__module__]
    pictures = {picture: config for picture, config in samples().items() if config["name"] == name}
    _, generator = generator_of(MakeConfig(generator=next(iter(pictures.values()))))
    attributes = generator.attributes()
    lines = [f"## {name}", "", inspect.getdoc(module) or "", ""]
    ranges = ", ".join(f"`{key}`" for key in attributes["per_trajectory"])
    shown = attributes["channels"][:8]
    rows = {
        "channels": ", ".join(f"`{channel}`" for channel in shown)
        + ", ..." * (len(attributes["channels"]) > len(shown)),
        "differ between trajectories": ", ".join(
            filter(None, [ranges, *(f"`{f}`" for f in attributes["static_fields"])])
        ),
        "tested against": TESTED.get(name, ""),
    }
    lines += [f"- {key}: {value}" for key, value in rows.items() if value]
    configs = [
        f"`{path.relative_to(ROOT)}`" for path in sorted((ROOT / "configs/data").glob("*.yaml")) if names(path) == name
    ]
    lines += [f"- configs: {', '.join(configs)}"] if configs else []
    lines += [f"- code: `{Path(str(module.__file__)).relative_to(ROOT)}`", ""]
    lines += [f"![{picture}](simulators/{picture}.png)\n" for picture in pictures]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(section, simulators())]).rstrip("\n") + "\n"


def names(path: Path) -> str:
    """The generator that a config names."""
    found = re.search(r"(?m)^ +name: *(\w+)", path.read_text())
    return found[1] if found else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", help="which to draw; none: all")
    parser.add_argument("--out", default=str(ROOT / "docs"), help="folder of simulators.md and of simulators/")
    args = parser.parse_args(arguments)
    wanted = samples()
    for picture in args.pictures:
        if picture not in wanted:
            raise SystemExit(f"{picture}: no such picture; known: {', '.join(wanted)}")
    folder = Path(args.out, "simulators")
    folder.mkdir(parents=True, exist_ok=True)
    for picture in args.pictures or wanted:
        data = draw(picture, wanted[picture])
        (folder / f"{picture}.png").write_bytes(data)
        print(f"{picture}: {len(data) / 1000:.0f} kB")
    Path(args.out, "simulators.md").write_text(page())


if __name__ == "__main__":
    main()
