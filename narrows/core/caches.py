"""What a processor with caches, threads and an operating system adds to the roofline.

Three facts, all of them nothing on a machine that lists no `caches`, `wake` or `faults`:

- A byte is served by the smallest level that still holds it: what was touched since its last
  use decides (stack distance; Mattson et al. 1970). Near the size of a cache the share served
  falls gradually, because caches are hashed, shared and not quite least-recently-used.
- An op large enough is split over the cores, and the sleeping ones are woken first.
- A large new block of memory is mapped by the operating system and cleared page by page on
  first touch; allocators keep small blocks and give large ones back after every use.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.tensor import Number
from narrows.core.workload import PERSISTENT, Op, Phase, Workload

STAGED = frozenset({"matmul", "conv", "attention_prefill", "attention_decode"})
"""Op classes whose kernels pack or reorder their operands before they compute (Goto and van de
Geijn 2008): there the seconds of memory and of arithmetic add, elsewhere they overlap."""

SPLIT: Mapping[str, float] = {
    "pointwise": 1, "copy": 1, "reduce": 1, "rope": 1, "optimizer": 1, "softmax": 1 / 16,
}  # fmt: skip
"""Op classes that run on one core up to a grain of elements (`wake.grain`), as a multiple of it.
Norms do up to one row. The others always wake all cores, which their fixed cost then holds."""

WAKE, FAULTS = "wake", "faults"
"""Rates: times a second that all cores can be woken; bytes a second of newly mapped memory.
Their levels are `wake.grain` (elements) and `faults.block` (bytes from which blocks are new)."""


def level_of(workload: Workload, name: str, machine: Machine) -> str:
    """The memory level or link that the tier of a tensor stands for on a machine."""
    tensor = workload.tensors[name]
    level = machine.tiers.get(tensor.tier)
    if level is None:
        raise NarrowsError(
            f"tensor {tensor.name!r} lives in tier {tensor.tier!r}, "
            f"which machine {machine.name!r} does not have"
        )
    return level


def held(reach: Number, size: float) -> Number:
    """Share of bytes a cache of `size` still holds after `reach` bytes were touched: 0 to 1."""
    return np.clip(2.0 - 1.5 * (reach / size), 0.0, 1.0)


def levels(
    workload: Workload, phase: Phase, local: list[bool], machine: Machine
) -> list[dict[str, Number]]:
    """Bytes of one run of every op by level, after caches; nothing for ops that are not local.

    A lasting tensor (weights, cache of keys and values, ...) comes round once a step, so between
    two steps all lasting bytes of the phase are touched; within a step, and for intermediates,
    only what lies between the two uses.
    """
    sizes = [machine.resources[f"{c}.capacity"].capacity for c in machine.caches]
    standing = standing_bytes(workload, phase) if sizes else 0.0
    touched: Number = 0.0
    last: dict[str, tuple[Number, Number]] = {}
    served: list[dict[str, Number]] = []
    for op, is_local in zip(phase.ops, local, strict=True):
        total: dict[str, Number] = {}
        served.append(total)
        if not is_local:
            continue
        uses = [
            (use.tensor, level_of(workload, use.tensor, machine),
             workload.tensors[use.tensor].bytes(use.at))
            for use in (*op.reads, *op.writes)
        ]  # fmt: skip
        if not sizes:
            for _, level, b in uses:
                total[level] = total.get(level, 0.0) + b
            continue
        own = sum((b for _, level, b in uses if level == machine.memory), start=0.0)
        for name, level, b in uses:
            if level != machine.memory:
                total[level] = total.get(level, 0.0) + b
                continue
            lasting = workload.tensors[name].role in PERSISTENT
            far = np.maximum(own, standing) if lasting else own
            recent: Number = 0.0
            near = far
            if name in last:
                when, before = last[name]
                recent = np.minimum(before, b)
                near = np.maximum(own, touched - when)
                near = np.minimum(near, far) if lasting else near
            for part, reach in ((recent, near), (b - recent, far)):
                kept: Number = 0.0
                for cache, size in zip(machine.caches, sizes, strict=True):
                    upto = np.maximum(held(reach, size), kept)
                    total[cache] = total.get(cache, 0.0) + (upto - kept) * part
                    kept = upto
                total[machine.memory] = total.get(machine.memory, 0.0) + (1.0 - kept) * part
        for name, level, b in uses:
            if level == machine.memory:
                last[name] = (touched, b)
        touched = touched + own
    return served


def standing_bytes(workload: Workload, phase: Phase) -> Number:
    """Bytes of the lasting tensors that one step of a phase goes through."""
    touched = {u.tensor for op in phase.ops for u in (*op.reads, *op.writes)}
    return sum(
        (t.bytes() for n, t in workload.tensors.items() if n in touched and t.role in PERSISTENT),
        start=0.0,
    )


def wake_seconds(workload: Workload, op: Op, machine: Machine) -> Number:
    """Seconds to wake the other cores for one run of an op; 0 where it runs on one."""
    rate, grain = machine.resources.get(WAKE), machine.resources.get(f"{WAKE}.grain")
    if rate is None or grain is None or not (op.kind in SPLIT or op.kind == "norm"):
        return 0.0
    most: Number = 0.0
    row: Number = 1.0
    for use in (*op.reads, *op.writes):
        tensor = workload.tensors[use.tensor]
        most = np.maximum(most, tensor.elements(use.at))
        if tensor.axes:
            row = np.maximum(row, tensor.extent(tuple(tensor.axes)[-1]))
    alone = row if op.kind == "norm" else SPLIT[op.kind] * grain.capacity
    return np.where(np.asarray(most > alone), 1 / rate.capacity, 0.0)


def fault_seconds(workload: Workload, op: Op, machine: Machine, known: set[str]) -> Number:
    """Seconds to map the new blocks that one run of an op writes.

    known: tensors the phase has touched before, which are in memory already; the op's own are
    added. Lasting tensors are in memory from the start, except what a training step makes anew.
    """
    rate, block = machine.resources.get(FAULTS), machine.resources.get(f"{FAULTS}.block")
    if rate is None or block is None:
        return 0.0
    seconds: Number = 0.0
    known.update(use.tensor for use in op.reads)
    for use in op.writes:
        tensor = workload.tensors[use.tensor]
        standing = tensor.role in PERSISTENT and tensor.role not in ("saved", "gradient")
        if use.tensor in known or standing:
            continue
        known.add(use.tensor)
        b = tensor.bytes(use.at)
        seconds = seconds + np.where(np.asarray(b) >= block.capacity, b / rate.capacity, 0.0)
    return seconds
