"""The bound: which resource is the narrowest point of a case, and how far the limit is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from narrows.core.calibration import UNCALIBRATED_P90
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.flow import ChannelRow
from narrows.core.flow import rows as channel_rows
from narrows.core.fusion import fuse
from narrows.core.machine import Machine
from narrows.core.price import PhasePrice, price
from narrows.core.workload import PERSISTENT, Phase, Workload


@dataclass(frozen=True, slots=True)
class Row:
    """One demand on one resource, by one op class, in one phase.

    need, have: in `unit` (have a second for rates). seconds: time of the op class in which this
    resource is the narrowest. share: of the phase's seconds. limit: least seconds the demand can
    take at the resource's own rate.
    """

    op: str
    resource: str
    need: float
    have: float
    unit: str
    seconds: float
    share: float
    limit: float


@dataclass(frozen=True, slots=True)
class LevelRow:
    """What one memory level must hold at the worst moment of a phase (need and have in bytes)."""

    resource: str
    need: float
    have: float | None
    fits: bool | None
    parts: Mapping[str, float]


@dataclass(frozen=True)
class PhaseBound:
    """The bound of one phase; seconds, flops and bytes are of all its steps."""

    name: str
    steps: float
    seconds: float
    limit_seconds: float
    narrowest: str
    share: Mapping[str, float]
    flops: float
    bytes: Mapping[str, float]
    fits: bool | None
    levels: tuple[LevelRow, ...]
    energy_joules: float | None
    error: float | None
    rows: tuple[Row, ...]
    measured_seconds: float | None = None
    measured_ops: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def distance(self) -> float:
        """How many times longer than the limit: measured where it was, predicted otherwise."""
        return (self.measured_seconds or self.seconds) / self.limit_seconds


@dataclass(frozen=True)
class Bound:
    """The answer of `bound`, by phase.

    how: what priced it (`roofline`, `calibrated roofline`, or the machine's own pricer), with
    the sentence that tells how far to trust it in `trust`. channels: the narrowest channel of
    every flow; bits have no seconds, so they take no part in `narrowest`.
    """

    workload: str
    machine: str
    phases: tuple[PhaseBound, ...]
    how: str
    trust: str
    measured_seconds: float | None = None
    measured_ops: Mapping[str, float] = field(default_factory=dict[str, float])
    channels: tuple[ChannelRow, ...] = ()

    @property
    def seconds(self) -> float:
        """Predicted seconds of the whole request."""
        return sum(p.seconds for p in self.phases)

    @property
    def limit_seconds(self) -> float:
        """Least seconds of the whole request."""
        return sum(p.limit_seconds for p in self.phases)

    @property
    def narrowest(self) -> str:
        """The resource that is the narrowest for the largest part of all seconds."""
        total: dict[str, float] = {}
        for p in self.phases:
            for name, share in p.share.items():
                total[name] = total.get(name, 0.0) + share * p.seconds
        return max(total, key=lambda name: total[name])

    @property
    def fits(self) -> bool | None:
        """Whether every phase fits its memories; None where a capacity is not known."""
        known = [p.fits for p in self.phases]
        return False if False in known else None if None in known else True

    def phase(self, name: str) -> PhaseBound:
        """A phase by its name."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise NarrowsError(f"no phase {name!r}; there is {', '.join(p.name for p in self.phases)}")


def live_peak(workload: Workload, phase: Phase) -> dict[str, dict[str, Any]]:
    """Bytes held at the worst moment of a phase: tier -> role -> bytes.

    Lasting tensors count whole; an intermediate counts from its first write to its last read.
    """
    held: dict[str, dict[str, Any]] = {}
    for tensor in workload.tensors.values():
        if tensor.role in PERSISTENT:
            roles = held.setdefault(tensor.tier, {})
            roles[tensor.role] = roles.get(tensor.role, 0.0) + tensor.bytes()
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, op in enumerate(phase.ops):
        for use in (*op.reads, *op.writes):
            if workload.tensors[use.tensor].role not in PERSISTENT:
                first.setdefault(use.tensor, i)
                last[use.tensor] = i
    begin: dict[int, list[str]] = {}
    end: dict[int, list[str]] = {}
    for name in first:
        begin.setdefault(first[name], []).append(name)
        end.setdefault(last[name], []).append(name)
    live: dict[str, Any] = {}
    peak: dict[str, Any] = {}
    for i in range(len(phase.ops)):
        for name in begin.get(i, ()):
            tensor = workload.tensors[name]
            live[tensor.tier] = live.get(tensor.tier, 0.0) + tensor.bytes()
        for tier, b in live.items():
            peak[tier] = np.maximum(peak.get(tier, 0.0), b)
        for name in end.get(i, ()):
            tensor = workload.tensors[name]
            live[tensor.tier] = live[tensor.tier] - tensor.bytes()
    for tier, b in peak.items():
        held.setdefault(tier, {})["activation"] = b
    return held


def _levels(workload: Workload, phase: Phase, machine: Machine) -> tuple[LevelRow, ...]:
    rows: list[LevelRow] = []
    for tier, roles in live_peak(workload, phase).items():
        need = float(sum(roles.values()))
        have = machine.capacity(tier)
        fits = None if have is None else need <= have
        parts = {role: float(b) for role, b in roles.items()}
        rows.append(LevelRow(machine.tiers.get(tier, tier), need, have, fits, parts))
    return tuple(rows)


def _error(priced: PhasePrice) -> float | None:
    """Seconds-weighted p90 error of the calibrations in use; None where none was used."""
    spent = (priced.repeat * priced.seconds).reshape(len(priced.phase.ops), -1).sum(axis=1)
    known = [c.error.p90 if c is not None and c.error is not None else None
             for c in priced.calibrations]  # fmt: skip
    if not any(e is not None and s > 0 for e, s in zip(known, spent, strict=True)):
        return None
    weights = [UNCALIBRATED_P90 if e is None else e for e in known]
    return float(np.average(weights, weights=spent))


def _rows(priced: PhasePrice, machine: Machine) -> tuple[Row, ...]:
    names, index = priced.narrowest()
    spent = priced.repeat * priced.seconds
    total = float(spent.sum()) or 1.0
    rows: list[Row] = []
    kinds = list(dict.fromkeys(op.kind for op in priced.phase.ops))
    for kind in kinds:
        mine = np.array([op.kind == kind for op in priced.phase.ops])
        for j, name in enumerate(names):
            repeat = priced.repeat[mine]
            if name in priced.bytes:
                need, unit = float((repeat * priced.bytes[name][mine]).sum()), "byte"
                have = machine.bandwidth(name)
            elif name.startswith("compute."):
                ran = np.array([
                    op.kind == kind and machine.compute(op.precision).name == name
                    for op in priced.phase.ops
                ])  # fmt: skip
                need, unit = float((priced.repeat * priced.flops)[ran].sum()), "flop"
                have = machine.resources[name].capacity
            else:
                ran = mine & (priced.terms[name].reshape(len(mine), -1).sum(axis=1) > 0)
                need, unit = float(priced.repeat[ran].sum()), "call"
                lost = float((priced.repeat * priced.terms[name])[ran].sum())
                have = need / lost if lost else 0.0
            if need <= 0:
                continue
            seconds = float(np.where(index[mine] == j, spent[mine], 0.0).sum())
            least = 0.0 if unit == "call" else need / have
            rows.append(Row(kind, name, need, have, unit, seconds, seconds / total, least))
    return tuple(sorted(rows, key=lambda r: -r.seconds))


def _phase(workload: Workload, priced: PhasePrice, machine: Machine) -> PhaseBound:
    share = {n: float(s) for n, s in priced.share().items()}
    seconds = float(priced.total_seconds)
    levels = _levels(workload, priced.phase, machine)
    known = [row.fits for row in levels]
    devices = float(workload.facts.get("devices", 1))
    return PhaseBound(
        name=priced.phase.name,
        steps=float(priced.phase.steps),
        seconds=seconds,
        limit_seconds=float(priced.total_limit),
        narrowest=max(share, key=lambda n: share[n]),
        share=share,
        flops=float(priced.total_flops),
        bytes={level: float(b) for level, b in priced.total_bytes().items()},
        fits=False if False in known else None if None in known else True,
        levels=levels,
        energy_joules=None if machine.watts is None else machine.watts * seconds * devices,
        error=_error(priced),
        rows=_rows(priced, machine),
    )


def _trust(machine: Machine, phases: tuple[PhaseBound, ...]) -> tuple[str, str]:
    if not machine.calibrations:
        return "roofline", "datasheet bound, expect 30-80 % optimism"
    errors = [p.error for p in phases if p.error is not None]
    if not errors:
        return "calibrated roofline", "calibrated, but not checked on rows it was not fitted on"
    return "calibrated roofline", f"p90 error {max(errors):.0%} on rows it was not fitted on"


def bound(case: Case) -> Bound:
    """Bound a single case (scalars; for sweeps use price() on array-valued workloads).

    Raises NarrowsError when the workload needs a tier, a link or a precision that the machine
    does not have.
    """
    machine = case.machine
    if machine.pricer is not None:
        module, _, name = machine.pricer.partition(":")
        return getattr(import_module(module), name)().bound(case)
    workload = fuse(case.workload, case.plan.fusion)
    phases = tuple(_phase(workload, p, machine) for p in price(workload, machine))
    how, trust = _trust(machine, phases)
    channels = channel_rows(workload, machine)
    return Bound(workload.name, machine.name, phases, how, trust, channels=channels)
