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
    """One micro-workload: what to call, and what it is."""

    name: str
    call: Call
    workload: Workload


def sample(
    rows: list[Micro], kernel: Call, between: Call, device: str, seconds: float, watch: Watch,
    progress: Progress,
) -> tuple[list[Sample], float]:  # fmt: skip
    """Time all micro-workloads round after round until `seconds` have passed, three at least.

    kernel: the reference kernel. between: a medley of other small ops.
    Returns what each took and what the reference kernel took, medians over the rounds. A row is
    taken as a ratio to the reference in its round, which takes out what the machine as a whole
    was slower then. On a processor a call is timed alone: after one that warms its data, and a
    medley that cools its code.
    """
    clock = Clock(device)
    calls = [row.call for row in rows]
    repeated, loops = [1] * len(rows), inner_calls(clock, kernel, REFERENCE_SECONDS)
    found: list[np.ndarray] = []
    references: list[float] = []
    begin = perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device != "cpu":
            repeated = [inner_calls(clock, call, 1e-3) for call in calls]
        while len(found) < 3 or perf_counter() - begin < seconds:
            times = np.empty(len(rows))
            beside: list[float] = []
            for i, call in enumerate(calls):
                if i % 24 == 0:
                    kernel()
                    beside.append(clock.read(kernel, loops))
                call()
                if device == "cpu":
                    between()
                times[i] = clock.read(call, repeated[i])
            references.append(float(np.median(beside)))
            found.append(times / references[-1])
            watch.sample()
            gone = (perf_counter() - begin) / seconds
            progress(min(gone, 1.0), f"op classes, round {len(found)}")
    finally:
        if collecting:
            gc.enable()
    scale = float(np.median(references))
    medians = np.median(np.stack(found), axis=0) * scale
    made = [Sample(r.name, r.workload, float(t)) for r, t in zip(rows, medians, strict=True)]
    return made, scale
