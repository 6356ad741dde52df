"""What accelerators have, from the vendors' data sheets; figures "with sparsity" halved.

Sources: NVIDIA H100, H200, B200 (DGX B200), GH200, A100, L40S, L4, V100 and T4 product data sheets; AMD Instinct MI300X and
MI250X data sheets. Network: one 400 Gb/s adapter per device in DGX H100, H200, B200 and 8 x MI300X platforms, 200 Gb/s in
DGX A100; where there is no such machine, 0.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        memory: bytes (data sheets say GB and mean GiB; the driver shows 1 to 2 % less).
        half, tf32, single: dense FLOP/s in 16 bit, in TF32 (or its equal) and in float32 on vector units.
        bandwidth: bytes/s of its memory.
        link: bytes/s in one direction to the others of its machine; `network`: to other machines.
        per_node: devices in a machine.
        source: where the figures come from.
    """

    name: str
    memory: float
    half: float
    tf32: float
    single: float
    bandwidth: float
    link: float
    network: float
    per_node: int
    source: str

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s for `half` or `single`; the latter in TF32 where torch's matmul precision allows it."""
        if dtype == "half":
            return self.half
        return self.single if torch.get_float32_matmul_precision() == "highest" else self.tf32


def _sheet(name: str, gib: float, tflops: tuple[float, float, float], gbs: tuple[float, float, float]) -> Device:
    half, tf32, single = (1e12 * value for value in tflops)
    bandwidth, link, network = (1e9 * value for value in gbs)
    return Device(name, gib * GIB, half, tf32, single, bandwidth, link, network, 8, f"{name} data sheet, dense")


# TFLOP/s: 16-bit matrix units, TF32, float32. GB/s: memory, link (one direction), network.
TABLE: dict[str, Device] = {
    "b200": _sheet("NVIDIA B200", 180, (2250.0, 1125.0, 75.0), (8000, 900, 50)),
    "gh200": _sheet("NVIDIA GH200", 96, (989.4, 494.7, 66.9), (4000, 450, 50)),
    "h200": _sheet("NVIDIA H200", 141, (989.4, 494.7, 66.9), (4800, 450, 50)),
    "h100": _sheet("NVIDIA H100 SXM", 80, (989.4, 494.7, 66.9), (3350, 450, 50)),
    "h100-pcie": _sheet("NVIDIA H100 PCIe", 80, (756.0, 378.0, 51.0), (2000, 64, 25)),
    "h100-nvl": _sheet("NVIDIA H100 NVL", 94, (835.5, 417.5, 60.0), (3900, 300, 25)),
    "a100": _sheet("NVIDIA A100 80GB SXM", 80, (312.0, 156.0, 19.5), (2039, 300, 25)),
    "a100-40gb": _sheet("NVIDIA A100 40GB SXM", 40, (312.0, 156.0, 19.5), (1555, 300, 25)),
    "l40s": _sheet("NVIDIA L40S", 48, (362.0, 183.0, 91.6), (864, 32, 25)),
    "l4": _sheet("NVIDIA L4", 24, (121.0, 60.0, 30.3), (300, 32, 12.5)),
    "v100": _sheet("NVIDIA V100 SXM2 32GB", 32, (125.0, 15.7, 15.7), (900, 150, 12.5)),
    "t4": _sheet("NVIDIA T4", 16, (65.0, 8.1, 8.1), (300, 16, 6.25)),
    "mi300x": _sheet("AMD MI300X", 192, (1307.4, 653.7, 163.4), (5300, 448, 50)),
    "mi250x": _sheet("AMD MI250X", 128, (383.0, 95.7, 47.9), (3277, 250, 25)),
}

# A device by the name that torch reports: the first whose words all stand in it.
_WORDS: list[tuple[str, str]] = [
    ("B200", "b200"),
    ("GH200", "gh200"),
    ("H200", "h200"),
    ("H100 PCIE", "h100-pcie"),
    ("H100 NVL", "h100-nvl"),
    ("H100", "h100"),
    ("A100", "a100"),
    ("L40S", "l40s"),
    ("L4", "l4"),
    ("V100", "v100"),
    ("T4", "t4"),
    ("MI300X", "mi300x"),
    ("MI250X", "mi250x"),
]


def names() -> list[str]:
    """What `find` takes."""
    return [*TABLE, "cpu"]


def find(name: str) -> Device:
    """A device by its name in the table; `cpu` is this machine, its speed measured now (a fraction of a second).

    Raises:
        ValueError: unknown.
    """
    if name == "cpu":
        return _this_machine()
    if name not in TABLE:
        raise ValueError(f"device={name}: unknown; one of {', '.join(names())}")
    return TABLE[name]


def recognise(name: str) -> Device | None:
    """The device behind a name as `torch.cuda.get_device_name` reports it; None if it is not in the table."""
    text = " " + " ".join(name.upper().replace("-", " ").split()) + " "
    return next((TABLE[key] for words, key in _WORDS if f" {words} " in text), None)  # whole words: "L4" is no "L40S"


def _this_machine() -> Device:
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    flops = _fastest(torch.float32, 768)
    copied = torch.empty(1 << 24)
    seconds = min(_time(lambda: copied.add_(1.0)) for _ in range(3))
    bandwidth = 2 * copied.nbytes / seconds
    half = _fastest(torch.bfloat16, 768)
    source = f"measured now: a matrix product on {torch.get_num_threads()} threads"
    return Device("this machine", memory, half, flops, flops, bandwidth, bandwidth / 2, 1e9, 1, source)


def _fastest(dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / min(_time(lambda: a @ a) for _ in range(3))


def _time(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return max(time.perf_counter() - start, 1e-9)
