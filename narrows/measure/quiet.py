"""How quiet a machine is while something is measured on it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

SPIN = 20_000
"""Additions of the spin kernel: about half a millisecond of one core, nothing in memory."""


@dataclass(frozen=True, slots=True)
class Quiet:
    """What disturbed a measurement, as fractions; None where the platform does not tell.

    variation: interquartile range over median of a fixed spin kernel. stolen: share of all
    processor time that the hypervisor gave to others. others: share that other processes of
    this system used. load: processes that wanted to run, averaged over the last minute.
    """

    variation: float
    stolen: float | None
    others: float | None
    load: float | None

    @property
    def quiet(self) -> bool:
        """Little enough disturbance for absolute figures to mean something."""
        return self.variation < 0.05 and (self.stolen or 0) < 0.02 and (self.others or 0) < 0.10

    def __str__(self) -> str:
        told = [f"spin kernel varies by {self.variation:.1%}"]
        if self.others is not None:
            told.append(f"other processes took {self.others:.0%} of the cores")
        if self.stolen is not None:
            told.append(f"the hypervisor {self.stolen:.1%}")
        if self.load is not None:
            told.append(f"load {self.load:.1f}")
        return ("quiet: " if self.quiet else "not quiet: ") + ", ".join(told)


def _jiffies() -> tuple[float, float, float] | None:
    """Seconds (all, busy, stolen) summed over cores since start, from /proc/stat; else None."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    if first[0] != "cpu" or len(first) < 9:
        return None
    # user nice system idle iowait irq softirq steal; guest time is inside user already
    numbers = [float(x) / tick for x in first[1:9]]
    idle = numbers[3] + numbers[4]
    return sum(numbers), sum(numbers) - idle - numbers[7], numbers[7]


def _own() -> float:
    """Processor seconds of this process so far, all threads."""
    times = os.times()
    return times.user + times.system


def spin() -> float:
    """Seconds of the spin kernel, once."""
    begin = perf_counter()
    total = 0
    for i in range(SPIN):
        total += i
    return perf_counter() - begin


@dataclass
class Watch:
    """Watches the machine from `start` to `stop`; `sample` in between, between measurements."""

    spins: list[float] = field(default_factory=list[float])
    _begin: tuple[float, float, float] | None = None
    _own: float = 0.0

    def start(self) -> Watch:
        """Begin to watch."""
        self._begin, self._own = _jiffies(), _own()
        return self.sample(9)

    def sample(self, times: int = 1) -> Watch:
        """Run the spin kernel a few times."""
        self.spins.extend(spin() for _ in range(times))
        return self

    def stop(self) -> Quiet:
        """What was seen since the start."""
        self.sample(9)
        low, middle, high = np.quantile(self.spins, (0.25, 0.5, 0.75))
        end, stolen, others = _jiffies(), None, None
        if self._begin is not None and end is not None and end[0] > self._begin[0]:
            total = end[0] - self._begin[0]
            stolen = (end[2] - self._begin[2]) / total
            others = max(end[1] - self._begin[1] - (_own() - self._own), 0.0) / total
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return Quiet(float((high - low) / middle), stolen, others, load)
