"""Timing of micro-workloads as they run inside a model, for the constants of a machine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from narrows.core.workload import Workload
from narrows.measure.fit import Sample
from narrows.measure.quiet import Watch
from narrows.measure.timing import Clock, Progress, inner_calls

Call = Callable[[], object]

REFERENCE = "reference"
"""Name of the rate (op/s) at which a machine runs the reference kernel."""

REFERENCE_SECONDS = 3e-3
"""What one reading of the reference kernel lasts at least: as long as a turn of validation."""


@dataclass(frozen=True)
class Micro:
    """One micro-workload: what to call, and what it is. role: see Sample."""

    name: str
    call: Call
    workload: Workload
    role: str = "class"


def sample(
    rows: list[Micro], kernel: Call, between: Call, device: str, seconds: float, watch: Watch,
    progress: Progress,
) -> tuple[list[Sample], float]:  # fmt: skip
    """Time all micro-workloads round after round until `seconds` have passed.

    kernel: the reference kernel. between: a medley of other small ops.
    Returns what each took and what the reference kernel took, medians over the rounds. A row is
    taken as a ratio to the reference in its round, which takes out what the machine as a whole
    was slower then. On a processor a call is timed alone: after one that warms its data, and a
    medley that cools its code. Every round has an order of its own; rows that the time did not
    suffice for are left out.
    """
    clock, order = Clock(device), np.random.default_rng(0)
    found: list[np.ndarray] = []
    references: list[float] = []
    begin = perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        loops = inner_calls(clock, kernel, REFERENCE_SECONDS)
        while not found or perf_counter() - begin < seconds:
            times, beside = np.full(len(rows), np.nan), list[float]()
            for count, i in enumerate(order.permutation(len(rows))):
                call = rows[i].call
                if count % 24 == 0:
                    kernel()
                    beside.append(clock.read(kernel, loops))
                    gone = (perf_counter() - begin) / seconds
                    progress(min(gone, 1.0), f"op classes, round {len(found) + 1}")
                    if gone > 1.0 and count:
                        break
                if device == "cpu":
                    call()
                    between()
                    times[i] = clock.read(call, 1)
                else:
                    times[i] = clock.read(call, inner_calls(clock, call, 1e-3))
            references.append(float(np.median(beside)))
            found.append(times / references[-1])
            watch.sample()
    finally:
        if collecting:
            gc.enable()
    scale = float(np.median(references))
    table = np.stack(found)
    made: list[Sample] = []
    for row, ratios in zip(rows, table.T, strict=True):
        seen = ratios[~np.isnan(ratios)]
        if seen.size:
            made.append(Sample(row.name, row.workload, float(np.median(seen)) * scale, row.role))
    return made, scale
