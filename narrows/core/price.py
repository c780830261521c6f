"""Seconds of every op of a workload on a machine, for one case or thousands in one call.

The law (Williams, Waterman and Patterson 2009, "Roofline", extended by a fixed cost):

    seconds = max(flops / (c * peak), bytes / (m * bandwidth) of each level) + fixed

with c, m and fixed the calibration of the op class (1, 1 and 0 without one). The limit is the
same maximum at the machine's own rates with nothing fixed: no run can be faster.

On a machine with caches the bytes of an op are shared out over them and the main memory; their
seconds add up, and kernels that pack their operands first add them to the arithmetic instead of
hiding them behind it (see caches.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from narrows.core import caches
from narrows.core.calibration import Calibration
from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.tensor import Number
from narrows.core.workload import Op, Phase, Workload

DISPATCH = "dispatch"
"""The resource that a fixed cost a call is charged to: launching, scheduling, start-up."""

TRAFFIC: Mapping[str, Callable[[Number], Number]] = {
    "all_reduce": lambda p: 2 * (p - 1) / p,
    "all_gather": lambda p: (p - 1) / p,
    "reduce_scatter": lambda p: (p - 1) / p,
    "all_to_all": lambda p: (p - 1) / p,
    "send_recv": lambda p: 1.0,
}
"""Bytes a rank sends in the ring form of a collective over p ranks, per byte of the message."""

IDEAL = Calibration("")


@dataclass(frozen=True)
class PhasePrice:
    """The priced ops of a phase. Arrays are (ops, *cases); `repeat` already holds the steps.

    flops, limit, seconds: of one run of an op. bytes: by memory level or link, of one run.
    terms: calibrated seconds of one run by resource; the largest is what narrows the op.
    """

    phase: Phase
    repeat: np.ndarray
    flops: np.ndarray
    bytes: Mapping[str, np.ndarray]
    limit: np.ndarray
    seconds: np.ndarray
    terms: Mapping[str, np.ndarray]
    calibrations: tuple[Calibration | None, ...]

    @property
    def total_seconds(self) -> np.ndarray:
        """Seconds of the phase, by case."""
        return (self.repeat * self.seconds).sum(axis=0)

    @property
    def total_limit(self) -> np.ndarray:
        """Least seconds the phase can take, by case."""
        return (self.repeat * self.limit).sum(axis=0)

    @property
    def total_flops(self) -> np.ndarray:
        """Operations of the phase, by case."""
        return (self.repeat * self.flops).sum(axis=0)

    def total_bytes(self) -> dict[str, np.ndarray]:
        """Bytes moved in the phase by memory level or link, by case."""
        return {level: (self.repeat * b).sum(axis=0) for level, b in self.bytes.items()}

    def narrowest(self) -> tuple[list[str], np.ndarray]:
        """Names of the resources, and for every op (and case) the index of the narrowest."""
        names = list(self.terms)
        return names, np.argmax(np.stack([self.terms[n] for n in names]), axis=0)

    def share(self) -> dict[str, np.ndarray]:
        """Fraction of the phase's seconds in which each resource is the narrowest, by case."""
        names, index = self.narrowest()
        spent = self.repeat * self.seconds
        total = np.maximum(spent.sum(axis=0), np.finfo(float).tiny)
        return {
            n: np.where(index == i, spent, 0.0).sum(axis=0) / total for i, n in enumerate(names)
        }


def tile_waste(op: Op, calibration: Calibration, units: int) -> Number:
    """Factor by which whole tiles and whole waves of them exceed the work asked for, >= 1.

    A product of (m, k) by (k, n) is made of ceil(m/rows) * ceil(n/columns) tiles; `units`
    of them run at once, and the last wave takes as long as a full one.
    """
    rows, columns = calibration.tile
    if not rows or not columns or "m" not in op.shape or "n" not in op.shape:
        return 1.0
    m, n = op.shape["m"], op.shape["n"]
    tiles = np.ceil(m / rows) * np.ceil(n / columns) * op.shape.get("batch", 1)
    if units:
        tiles = np.ceil(tiles / units) * units
    return np.maximum(tiles * rows * columns / (m * n * op.shape.get("batch", 1)), 1.0)


def _message(workload: Workload, op: Op, machine: Machine) -> tuple[str, Number, float]:
    """Link, bytes a rank sends over it, and latency of a collective."""
    name = machine.tiers.get("peers")
    if name is None or name not in machine.links:
        raise NarrowsError(
            f"op {op.name!r} talks to peers, but machine {machine.name!r} has no link to any "
            "(tier 'peers')"
        )
    size = sum((workload.tensors[u.tensor].bytes(u.at) for u in op.reads), start=0.0)
    return name, size * TRAFFIC[op.kind](op.shape.get("peers", 2)), machine.links[name].latency


def calibration_of(op: Op, machine: Machine) -> Calibration | None:
    """The calibration of an op's class: the most special one the machine has.

    Classes are told apart by kind, then by precision, then by whether a product has a vector on
    one side, because libraries run another kernel for each: `matmul.fp32.vector`, `matmul.fp32`,
    `matmul`.
    """
    if not machine.calibrations:
        return None
    special = f"{op.kind}.{op.precision}"
    names = [special, op.kind]
    if "m" in op.shape and np.all(np.asarray(op.shape["m"]) <= 1):
        names = [f"{special}.vector", *names]
    return next((machine.calibrations[n] for n in names if n in machine.calibrations), None)


def price_phase(workload: Workload, phase: Phase, machine: Machine) -> PhasePrice:
    """Price one phase; see PhasePrice for the shapes."""
    ops = phase.ops
    local = [op if op.kind not in TRAFFIC else None for op in ops]
    levels = caches.levels(workload, phase, [op is not None for op in local], machine)
    along = {*machine.caches, machine.memory} if machine.caches else set[str]()
    calibrations = tuple(calibration_of(op, machine) for op in ops)
    flops = [workload.op_flops(op) for op in ops]
    repeat = [phase.steps * op.repeat for op in ops]
    shape = np.broadcast_shapes(
        *(np.shape(x) for x in (*flops, *repeat)),
        *(np.shape(b) for row in levels for b in row.values()),
    )

    def table(rows: Sequence[Number]) -> np.ndarray:
        out = np.zeros((len(rows), *shape))
        for i, row in enumerate(rows):
            out[i] = row
        return out

    limit = np.zeros((len(ops), *shape))
    slowest = np.zeros_like(limit)
    all_bytes: dict[str, np.ndarray] = {}
    terms: dict[str, np.ndarray] = {}

    def charge(table_: dict[str, np.ndarray], name: str, i: int, value: Number) -> None:
        table_.setdefault(name, np.zeros((len(ops), *shape)))[i] += value

    known: set[str] = set()
    for i, op in enumerate(ops):
        calibration = calibrations[i] or IDEAL
        fixed: Number = calibration.fixed
        if local[i] is None:
            link, sent, latency = _message(workload, op, machine)
            levels[i] = {link: sent}
            if calibrations[i] is None:
                fixed = latency
        if np.any(np.asarray(flops[i]) > 0):
            unit = machine.compute(op.precision)
            least = flops[i] / unit.capacity
            limit[i] = np.maximum(limit[i], least)
            taken = least * (tile_waste(op, calibration, machine.units) / calibration.compute)
            slowest[i] = np.maximum(slowest[i], taken)
            charge(terms, unit.name, i, taken)
        passed: Number = 0.0
        for level, b in levels[i].items():
            least = b / machine.bandwidth(level)
            limit[i] = np.maximum(limit[i], least)
            charge(all_bytes, level, i, b)
            charge(terms, level, i, least / calibration.memory)
            if level in along:
                passed = passed + least / calibration.memory
            else:
                slowest[i] = np.maximum(slowest[i], least / calibration.memory)
        staged = along and op.kind in caches.STAGED
        slowest[i] = slowest[i] + passed if staged else np.maximum(slowest[i], passed)
        fixed = fixed + caches.wake_seconds(workload, op, machine)
        if np.any(np.asarray(fixed) > 0):
            charge(terms, DISPATCH, i, fixed)
            slowest[i] = slowest[i] + fixed
        faults = caches.fault_seconds(workload, op, machine, known)
        if np.any(np.asarray(faults) > 0):
            charge(terms, caches.FAULTS, i, faults)
            slowest[i] = slowest[i] + faults
    return PhasePrice(
        phase, table(repeat), table(flops), all_bytes, limit, slowest, terms, calibrations
    )


def price(workload: Workload, machine: Machine) -> tuple[PhasePrice, ...]:
    """Price every phase of a workload on a machine.

    Extents, flops and repeats may be arrays over cases (they broadcast), so a sweep over
    prompts, batches or kept tokens is one call.
    """
    return tuple(price_phase(workload, phase, machine) for phase in workload.phases)
