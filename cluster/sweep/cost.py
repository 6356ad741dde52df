"""What rows cost: measured where rows are done, predicted from those for the others, else from a device's peak."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.sweep.config import CapConfig, MachineConfig
from cluster.sweep.results import Result
from cluster.sweep.table import Row
from trainer.config import ConfigError


@dataclass
class Cost:
    """Of some rows together.

    Attributes:
        runs, flops: how many, and what they compute.
        hours: device-hours. price: of those; 0 where hours have none.
    """

    runs: int
    flops: float
    hours: float
    price: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.runs + other.runs, self.flops + other.flops, self.hours + other.hours, self.price + other.price
        )


class Rates:
    """Device-seconds of rows.

    Args:
        results: row id -> result; those that ended well say how fast runs are, start and validation included.
        machine: what hours cost, and the device to predict for where nothing was measured.
    """

    def __init__(self, results: Mapping[str, Result], machine: MachineConfig) -> None:
        self.results, self.machine = results, machine
        done = [
            found
            for found in results.values()
            if found["status"] == "ok" and found.get("flops") and found.get("device_seconds")
        ]
        # A run that was started again has the time in between in its seconds.
        whole = [found for found in done if not found.get("retries")] or done
        self._measured = sorted((math.log(found["flops"]), found["flops"] / found["device_seconds"]) for found in whole)
        self._peak: float | None = None

    @property
    def source(self) -> str:
        """Where predictions come from, in words."""
        if self._measured:
            return f"measured on {len(self._measured)} done runs, of each the one nearest in FLOPs"
        return f"{self.machine.mfu:.0%} of the peak of {self.machine.device}"

    def seconds(self, row: Row) -> float:
        """Device-seconds of a row: measured if it is done, else predicted."""
        spent = self.results.get(row.id, {}).get("device_seconds")
        if spent is not None:
            return float(spent)
        if self._measured:
            return row.flops / min(self._measured, key=lambda known: abs(known[0] - math.log(row.flops)))[1]
        if self._peak is None:
            from trainer.planning.devices import find

            device = find(self.machine.device)
            self._peak = device.single if self.machine.device == "cpu" else device.half
        return row.flops / (self._peak * self.machine.mfu)

    def of(self, rows: Sequence[Row]) -> Cost:
        """What some rows cost together."""
        hours = sum(self.seconds(row) for row in rows) / 3600
        return Cost(len(rows), sum(row.flops for row in rows), hours, hours * self.machine.price)


def refuse_above(cap: CapConfig, whole: Cost, rows: Sequence[Row]) -> None:
    """Raises ConfigError where a sweep would cost more than it may, with the row that costs most."""
    for name, limit, value in (
        ("runs", cap.runs, whole.runs),
        ("flops", cap.flops, whole.flops),
        ("hours", cap.hours, whole.hours),
        ("cost", cap.cost, whole.price),
    ):
        if limit and value > limit:
            largest = max(rows, key=lambda row: row.flops)
            raise ConfigError(
                f"cap.{name}={limit:g}: the sweep comes to {value:.4g}; raise the cap or drop rows (the largest, "
                f"{largest.label}, is {largest.flops / whole.flops:.0%} of the FLOPs)"
            )


def cap_of(options: Mapping[str, Any]) -> tuple[CapConfig, MachineConfig]:
    """The cap and the machine of a sweep's config as plain containers."""
    return CapConfig(**options["cap"]), MachineConfig(**options["machine"])
