"""What a plan's fusion removes: intermediates that never reach memory, and launches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from narrows.core.tensor import Number
from narrows.core.workload import FUSIBLE, PERSISTENT, Op, Phase, Use, Workload


def _merge(ops: list[Op], kind: str, name: str, workload: Workload, inner: set[str]) -> Op:
    """One kernel for several ops of equal repeat; tensors in `inner` stay on chip."""

    def outer(uses: list[Use]) -> tuple[Use, ...]:
        kept: dict[str, Use] = {}
        for use in uses:
            if use.tensor not in inner:
                kept.setdefault(use.tensor, use)
        return tuple(kept.values())

    written = {u.tensor for op in ops for u in op.writes}
    flops: Number = 0.0
    for op in ops:
        flops = flops + op.flops
    reads = outer([u for op in ops for u in op.reads if u.tensor not in written])
    held = {u.tensor for u in reads}
    per_element: dict[str, Number] = {}
    for op in ops:
        for tensor, rate in op.per_element.items():
            if tensor in held:
                per_element[tensor] = per_element.get(tensor, 0.0) + rate
            else:
                use = next(u for u in op.reads if u.tensor == tensor)
                flops = flops + rate * workload.tensors[tensor].elements(use.at)
    heavy = max(ops, key=lambda op: (op.kind in ("matmul", "conv"), op.kind not in FUSIBLE))
    return replace(
        heavy, name=name, kind=kind, reads=reads, writes=outer([u for o in ops for u in o.writes]),
        flops=flops, per_element=per_element,
    )  # fmt: skip


def _runs(phase: Phase, compiled: bool, flash: bool) -> list[list[Op]]:
    """Neighbours that become one kernel, in order; a run of one stays as it is."""
    runs: list[list[Op]] = []
    for op in phase.ops:
        last = runs[-1][-1] if runs else None
        joins = False
        if last is not None and np.array_equal(last.repeat, op.repeat):
            attention = flash and op.group.startswith("attention")
            if attention:
                joins = last.group == op.group
            elif compiled:
                held = flash and last.group.startswith("attention")
                joins = op.kind in FUSIBLE and last.kind in FUSIBLE and not held
        if joins:
            runs[-1].append(op)
        else:
            runs.append([op])
    return runs


def fuse(workload: Workload, fusion: tuple[str, ...]) -> Workload:
    """The workload as a plan's fusion would run it; the same for traced and closed forms."""
    if not fusion:
        return workload
    phases: list[Phase] = []
    for phase in workload.phases:
        readers: dict[str, int] = {}
        for op in phase.ops:
            for use in op.reads:
                readers[use.tensor] = readers.get(use.tensor, 0) + 1
        ops: list[Op] = []
        for run in _runs(phase, "compiled" in fusion, "flash" in fusion):
            if len(run) == 1:
                ops.append(run[0])
                continue
            inside: dict[str, int] = {}
            for op in run:
                for use in op.reads:
                    inside[use.tensor] = inside.get(use.tensor, 0) + 1
            written = {u.tensor for op in run for u in op.writes}
            inner = {
                t for t in written
                if inside.get(t, 0) == readers.get(t, 0) > 0
                and workload.tensors[t].role not in PERSISTENT
            }  # fmt: skip
            group = run[0].group
            attention = group.startswith("attention")
            kind = group if attention else max(run, key=lambda o: o.kind == "norm").kind
            ops.append(_merge(run, kind, group or run[-1].name, workload, inner))
        phases.append(replace(phase, ops=tuple(ops)))
    return replace(workload, phases=tuple(phases))
