"""What attention must move across each faster memory of a machine: the memory-level part of bound.

The price of a phase counts every operand once, as a kernel with unlimited fast memory would. Real
kernels have the bytes of a cache or a shared memory, and what does not fit is read again. For
every attention of a phase and every such level this gives the proven least (core/traffic.py,
after Saha and Ye 2024), what the best known program for that size moves, and what the case's own
plan moves; the first can not be beaten, the last two can be compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from narrows.core.case import Case
from narrows.core.fusion import fuse
from narrows.core.machine import Machine
from narrows.core.resource import Kind
from narrows.core.traffic import LEAST_MEMORY, Attention, best_program, least_bytes
from narrows.core.workload import Op, Phase, Workload


@dataclass(frozen=True, slots=True)
class HierarchyRow:
    """One attention in front of one fast memory; bytes are of the whole phase, all its steps.

    capacity: bytes of the level. floor: operands and result, once. least: proven lower bound.
    program, reached: the best known program for this size and what it moves. planned: what the
    plan moves in main memory when no cache helps (written scores included, unless fused away).
    behind: the memory that the bytes come from. seconds: of `reached` at its rate; None where the
    machine does not list one.
    """

    phase: str
    op: str
    level: str
    capacity: float
    floor: float
    least: float
    program: str
    reached: float
    planned: float
    behind: str
    seconds: float | None


def fast_levels(machine: Machine) -> dict[str, float]:
    """Memories in front of the main one, in bytes, smallest first."""
    main = machine.capacity("device")
    own = set(machine.tiers.values())
    found = {
        name.removesuffix(".capacity"): r.capacity
        for name, r in machine.resources.items()
        if name.endswith(".capacity") and r.kind is Kind.LEVEL
        and name.removesuffix(".capacity") not in own and (main is None or r.capacity < main)
    }  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: item[1]))


def hierarchy(case: Case) -> tuple[HierarchyRow, ...]:
    """Rows for every attention of a case and every fast memory of its machine.

    Empty where the machine lists no such memory or the work has no attention. Figures of cases,
    not arrays of them.
    """
    levels = fast_levels(case.machine)
    if not levels:
        return ()
    planned = fuse(case.workload, case.plan.fusion)
    rows: list[HierarchyRow] = []
    for phase, run in zip(case.workload.phases, planned.phases, strict=True):
        for op, value in _attentions(phase):
            attention, count = _shape(op)
            element = _element_bytes(case.workload, op, value)
            times = count * float(op.repeat) * float(phase.steps)
            kind = op.group.partition(":")[0]
            moved = _moved(planned, run, kind, op) * float(phase.steps)
            for level, capacity in levels.items():
                behind, rate = _behind(case.machine, level, list(levels))
                words = int(capacity / element)
                if words < LEAST_MEMORY:
                    continue
                best = best_program(attention, words)
                least = float(least_bytes(attention, capacity, element)) * times
                reached = best.words * element * times
                rows.append(HierarchyRow(
                    phase.name, kind, level, capacity, float(attention.floor) * element * times,
                    least, best.name, reached, moved, behind, reached / rate if rate else None,
                ))  # fmt: skip
    return tuple(rows)


def _behind(machine: Machine, level: str, levels: list[str]) -> tuple[str, float | None]:
    """The next slower memory behind a level, and its bytes a second."""
    later = levels[levels.index(level) + 1 :]
    name = later[0] if later else machine.memory
    resource = machine.resources.get(name)
    return name, resource.capacity if resource is not None else None


def _attentions(phase: Phase) -> Iterator[tuple[Op, Op]]:
    """The two products of every attention: of queries and keys, and of weights and values."""
    products = [
        op for op in phase.ops
        if op.kind == "matmul" and op.group.startswith("attention")
        and not op.group.endswith("backward") and {"q", "kv", "channel"} <= op.shape.keys()
    ]  # fmt: skip
    yield from zip(products[::2], products[1::2], strict=False)


def _shape(op: Op) -> tuple[Attention, float]:
    """The attention of the query heads that share keys, and how many of them one run does.

    Causal masks hide what is not needed: the pairs that are seen count, the square does not.
    """
    s = {name: float(np.asarray(size)) for name, size in op.shape.items()}
    group = s.get("heads", 1.0) / s.get("kv_heads", s.get("heads", 1.0))
    queries, keys = round(s["q"] * group), round(s["kv"])
    pairs = s.get("causal", 1.0) * queries * keys
    return Attention(queries, keys, s["channel"], s["channel"], pairs), s["batch"] / group


def _element_bytes(workload: Workload, *ops: Op) -> float:
    """Of the smallest element among queries, keys and values: a bound must not count more."""
    codecs = [workload.tensors[u.tensor].codec for op in ops for u in op.reads]
    return min(codec.bits_per_element for codec in codecs) / 8


def _moved(planned: Workload, run: Phase, kind: str, like: Op) -> float:
    """Bytes that the plan's ops of an attention group read and write in one step."""
    ops = [op for op in run.ops if op.kind == kind or op.group == like.group]
    return float(sum(
        op.repeat * planned.tensors[u.tensor].bytes(u.at)
        for op in ops for u in (*op.reads, *op.writes)
    ))  # fmt: skip
