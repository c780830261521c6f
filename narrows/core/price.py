"""Seconds of every op of a workload on a machine, for one case or thousands in one call.

The law (Williams, Waterman and Patterson 2009, "Roofline", extended by a fixed cost):

    seconds = max(flops / (c * peak), bytes / (m * bandwidth) of each level) + fixed

with c, m and fixed the calibration of the op class (1, 1 and 0 without one); law.py refines it
where a calibration knows the tiles of the kernel. The limit is the same maximum at the machine's
own rates with nothing fixed: no run can be faster.

On a machine with caches the bytes of an op are shared out over them and the main memory; their
seconds add up, and kernels that pack their operands first add them to the arithmetic instead of
hiding them behind it (see caches.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from narrows.core import caches, law
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


FUNCTIONS = (
    "gelu_backward", "silu_backward", "gelu", "silu", "tanh", "sigmoid", "exp", "log", "erf",
    "cos", "sin", "softplus", "mish", "elu",
)  # fmt: skip
"""Pointwise ops that evaluate a transcendental function of every element: counted as one
operation like any other, they take many. Told by how the last part of an op's name begins."""


def class_of(op: Op) -> tuple[str, ...]:
    """Names of an op's class, the most special first.

    Classes are told apart by kind, then by precision, then by what makes a library run another
    kernel: a product with a vector, a transcendental function, a backward pass. So
    `matmul.fp32.vector`, `matmul.fp32`, `matmul`.
    """
    special = f"{op.kind}.{op.precision}"
    name = op.name.rsplit(".", 1)[-1]
    if op.kind == "matmul" and "m" in op.shape and np.all(np.asarray(op.shape["m"]) <= 1):
        return f"{special}.vector", special, op.kind
    if op.kind == "pointwise":
        function = next((f for f in FUNCTIONS if name.startswith(f)), None)
        if function is not None:
            return f"{special}.{function}", f"{special}.function", special, op.kind
    elif name.endswith("_backward"):
        return f"{special}.backward", special, op.kind
    return special, op.kind


def calibration_of(op: Op, machine: Machine) -> Calibration | None:
    """The calibration of an op's class: the most special one the machine has."""
    known = machine.calibrations
    if not known:
        return None
    return next((known[name] for name in class_of(op) if name in known), None)


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
        if name not in table_:
            table_[name] = np.zeros((len(ops), *shape))
        table_[name][i] += value

    known: set[str] = set()
    for i, op in enumerate(ops):
        calibration = calibrations[i] or IDEAL
        latency = 0.0
        if local[i] is None:
            link, sent, delay = _message(workload, op, machine)
            levels[i] = {link: sent}
            latency = delay if calibrations[i] is None else 0.0
        least: Number = 0.0
        unit = machine.compute(op.precision) if np.any(np.asarray(flops[i]) > 0) else None
        if unit is not None:
            least = flops[i] / unit.capacity
            limit[i] = np.maximum(limit[i], least)
        passed: Number = 0.0
        slowest_level: Number = 0.0
        rate = machine.bandwidth(machine.memory)
        for level, b in levels[i].items():
            needed = b / machine.bandwidth(level)
            limit[i] = np.maximum(limit[i], needed)
            charge(all_bytes, level, i, b)
            if level in along:
                passed = passed + needed
            else:
                slowest_level = np.maximum(slowest_level, needed)
        staged = along and op.kind in caches.STAGED
        hidden = slowest_level if staged else np.maximum(slowest_level, passed)
        ran = law.run(op.kind, least, hidden, op.shape, calibration, machine.units, flops[i], rate)
        if unit is not None:
            charge(terms, unit.name, i, ran.compute)
        plain = hidden / calibration.memory
        stretch = np.divide(ran.memory, plain, out=np.ones(shape), where=plain > 0)
        for level, b in levels[i].items():
            needed = b / machine.bandwidth(level) / calibration.memory
            charge(terms, level, i, needed * stretch)
        slowest[i] = ran.seconds + (passed / calibration.memory if staged else 0.0)
        fixed: Number = ran.fixed + latency
        slowest[i] = slowest[i] + latency
        woken = caches.wake_seconds(workload, op, machine)
        slowest[i] = slowest[i] + woken
        if np.any(np.asarray(fixed + woken) > 0):
            charge(terms, DISPATCH, i, fixed + woken)
        faults = caches.fault_seconds(workload, op, machine, known)
        if not isinstance(faults, float) or faults:
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
