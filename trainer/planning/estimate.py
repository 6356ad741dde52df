"""From a traced step to bytes, seconds and utilisation on a device.

**Time.** Each operation takes as long as its FLOPs at the peak of its dtype or its bytes at the memory's bandwidth, whichever
is more, and at least a launch; peaks are taken at `ATTAINABLE`. Collectives send what rings do, over the link within a
machine and the network adapters of all members between machines. Those of a tensor-parallel block stand in the way; those of data
parallelism hide behind the computation as far as they are shorter. Waiting for data, host delays and stragglers are
left out: the step time is a lower bound, the MFU an upper one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.planning.devices import Device
from trainer.planning.simulate import Trace, trace
from trainer.planning.tracking import Route, Traffic
from trainer.schema import RunConfig

ATTAINABLE = 0.75  # of peak FLOP/s and bandwidths, by large operations
LAUNCH_SECONDS = 5e-6  # the host needs about so long for one operation
RESERVE = 0.08  # of a device's memory: driver, libraries' workspaces, buffers of NCCL, fragmentation

# Bytes that a rank sends per byte of the full tensor, times ranks / (ranks - 1).
_SENT = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "all-to-all": 1.0, "broadcast": 1.0}


@dataclass
class Plan:
    """What a run needs on `device`, per rank; times in seconds, of one optimiser step. `host_memory` of a machine in bytes; 0
    where it is not known, and then nothing is held to it."""

    config: RunConfig
    device: Device
    trace: Trace
    compute_seconds: float = 0.0
    route_seconds: dict[Route, float] = field(default_factory=dict)
    host_memory: float = 0.0

    @property
    def host_bytes(self) -> float:
        """Of a machine's own memory: what is offloaded, and the copy from which a save in the background is written."""
        copied = (
            self.trace.checkpoint_bytes / self.config.resources.world_size if self.config.checkpoint.background else 0
        )
        return (self.trace.host_bytes + copied) * self.config.resources.processes_per_node

    @property
    def host_fits(self) -> bool:
        return not self.host_memory or self.host_bytes <= self.host_memory * (1 - RESERVE)

    @property
    def usable(self) -> float:
        """Bytes of a device that tensors may take; on a CPU the ranks of a machine share its memory."""
        shared = self.config.resources.processes_per_node if self.device.per_node == 1 else 1
        return self.device.memory * (1 - RESERVE) / shared

    @property
    def fits(self) -> bool:
        return self.trace.peak <= self.usable and self.host_fits

    @property
    def blocking_seconds(self) -> float:
        return sum(seconds for route, seconds in self.route_seconds.items() if route.blocking)

    @property
    def overlapped_seconds(self) -> float:
        return sum(seconds for route, seconds in self.route_seconds.items() if not route.blocking)

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.overlapped_seconds) + self.blocking_seconds

    @property
    def step_flops(self) -> int | None:
        """Model FLOPs of a step, over all ranks."""
        per_sample = self.trace.flops_per_sample
        return None if per_sample is None else per_sample * self.config.train.global_batch

    @property
    def peak_flops(self) -> float:
        """Of one device at the run's precision."""
        return self.device.peak("single" if self.config.train.precision.startswith("32") else "half")

    @property
    def mfu(self) -> float | None:
        flops = self.step_flops
        world = self.config.resources.world_size
        return None if flops is None else flops / (self.step_seconds * world * self.peak_flops)

    def checkpoint_seconds(self, bandwidth: float) -> float:
        """To send a checkpoint at `bandwidth` bytes/s of the store, all ranks together."""
        return self.trace.checkpoint_bytes / bandwidth


def plan(config: RunConfig, device: Device, host_memory: float = 0.0) -> Plan:
    """Traces a step of `config` on its `resources` and says what it needs on `device` (and of a machine's `host_memory`).

    Raises:
        RuntimeError: as `simulate.trace`.
    """
    made = Plan(config, device, trace(config, accelerator=device.per_node > 1), host_memory=host_memory)
    made.compute_seconds = compute_seconds(made.trace, device)
    made.route_seconds = {
        route: sent_bytes(route, traffic) / (speed(route, device) * ATTAINABLE)
        for route, traffic in made.trace.traffic.items()
        if route.ranks > 1
    }
    return made


def compute_seconds(found: Trace, device: Device) -> float:
    """Seconds of all operations of a step, one after the other."""
    half, single, bandwidth = (
        value * ATTAINABLE for value in (device.peak("half"), device.peak("single"), device.bandwidth)
    )
    return sum(
        count * max(work.flops / (half if work.half else single), work.bytes / bandwidth, LAUNCH_SECONDS)
        for work, count in found.work.items()
    )


def speed(route: Route, device: Device) -> float:
    """Bytes/s that a ring gets through: between machines, the adapters of all members on one of them work together."""
    return min(device.link, route.per_machine * device.network) if route.across else device.link


def sent_bytes(route: Route, traffic: Traffic) -> float:
    """What one rank sends."""
    return traffic.bytes * _SENT[route.kind] * (route.ranks - 1) / route.ranks
