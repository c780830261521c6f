"""What a plan's fusion removes: intermediates that never reach memory, and launches.

Two rewrites, the same for traced and closed forms, applied in this order:

`flash` makes one kernel of every attention group (ops that share a `group` starting with
`attention`): scores stay on chip, and what the mask hides is not computed (`causal` in the
shape of the scores is the share that is visible; Dao 2023, "FlashAttention-2", section 3.1).

`compiled` makes one kernel of every chain of pointwise work, reductions and copies, as loop
compilers do: two fusible ops join when one reads what the other writes, they run equally often
and belong to the same group (a backward pass is compiled apart from its forward pass), and no
product or other kernel lies on a path between them. The last condition is checked by depth:
the number of kernels that a chain cannot cross on the longest path to an op. Every edge out of
a chain leads to a heavy kernel or to a larger depth, so kernels never wait for each other.

A tensor is gone when one kernel both writes it and is its only reader. Tensors that outlive a
step and outputs are never gone, but for what an attention group saves for its own backward
group: fused kernels make the scores again. Operations are conserved but for masked scores; bytes
never grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np

from narrows.core.tensor import Number
from narrows.core.workload import FUSIBLE, PERSISTENT, Op, Phase, Use, Workload

LASTING = PERSISTENT | {"output"}
"""Roles that fusion never removes."""


def fuse(workload: Workload, fusion: Sequence[str]) -> Workload:
    """The workload as a plan's fusion would run it (see plan.FUSIONS)."""
    phases = workload.phases
    if "flash" in fusion:
        phases = tuple(_merged(workload, p, _attention(p), True) for p in phases)
    if "compiled" in fusion:
        phases = tuple(_merged(workload, p, _chains(p), False) for p in phases)
    used = {u.tensor for p in phases for op in p.ops for u in (*op.reads, *op.writes)}
    tensors = {n: t for n, t in workload.tensors.items() if n in used or t.role != "saved"}
    return replace(workload, tensors=tensors, phases=phases)


def _attention(phase: Phase) -> list[int]:
    """Cluster of every op: its attention group, or itself alone."""
    first: dict[str, int] = {}
    return [
        first.setdefault(op.group, i) if op.group.startswith("attention") else i
        for i, op in enumerate(phase.ops)
    ]


def _chains(phase: Phase) -> list[int]:
    """Cluster of every op: the chain of fusible ops it belongs to, or itself alone."""
    parent = list(range(len(phase.ops)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    depth = [0] * len(phase.ops)
    writer: dict[str, int] = {}
    for i, op in enumerate(phase.ops):
        sources = {writer[u.tensor] for u in op.reads if u.tensor in writer}
        joined = {j for j in sources if _join(phase.ops[j], op)}
        for j in sources:
            apart = j not in joined and (op.kind in FUSIBLE or phase.ops[j].kind not in FUSIBLE)
            depth[i] = max(depth[i], depth[j] + apart)
        for j in joined:
            if depth[j] == depth[i]:
                parent[root(i)] = root(j)
        writer.update({u.tensor: i for u in op.writes})
    return [root(i) for i in range(len(phase.ops))]


def _join(before: Op, op: Op) -> bool:
    """Whether a loop compiler could make one kernel of an op and one that reads its output."""
    return (
        before.kind in FUSIBLE
        and op.kind in FUSIBLE
        and before.group == op.group
        and np.array_equal(before.repeat, op.repeat)
    )


def _order(phase: Phase, cluster: Sequence[int], last: Mapping[int, int]) -> list[int]:
    """Clusters so that each comes after those it reads from, else as their last members do."""
    writer: dict[str, int] = {}
    needs: dict[int, set[int]] = {c: set() for c in last}
    feeds: dict[int, set[int]] = {c: set() for c in last}
    for i, op in enumerate(phase.ops):
        for use in op.reads:
            source = writer.get(use.tensor, cluster[i])
            if source != cluster[i]:
                needs[cluster[i]].add(source)
                feeds[source].add(cluster[i])
        writer.update({u.tensor: cluster[i] for u in op.writes})
    ready = [(last[c], c) for c, sources in needs.items() if not sources]
    heapify(ready)
    order: list[int] = []
    while ready:
        _, c = heappop(ready)
        order.append(c)
        for after in feeds[c]:
            needs[after].discard(c)
            if not needs[after]:
                heappush(ready, (last[after], after))
    # Groups that were not of one piece wait for each other: they stay where they were.
    return [*order, *sorted((c for c in last if needs[c]), key=lambda c: last[c])]


def _merged(workload: Workload, phase: Phase, cluster: Sequence[int], attention: bool) -> Phase:
    """The phase with every cluster as one op."""
    members: dict[int, list[int]] = {}
    for i, c in enumerate(cluster):
        members.setdefault(c, []).append(i)
    readers: dict[str, set[int]] = {}
    for i, op in enumerate(phase.ops):
        for use in op.reads:
            readers.setdefault(use.tensor, set()).add(cluster[i])
    firsts = {c: phase.ops[inside[0]] for c, inside in members.items()}
    whole = {c for c, op in firsts.items() if attention and op.group.startswith("attention")}
    remade = _remade(workload, phase, readers, cluster, whole)
    made: dict[int, Op] = {}
    order = _order(phase, cluster, {c: inside[-1] for c, inside in members.items()})
    for c, inside in members.items():
        ops = [phase.ops[i] for i in inside]
        if len(ops) == 1 and c not in whole:
            made[c] = ops[0]
            continue
        gone = {
            u.tensor for op in ops for u in op.writes
            if readers.get(u.tensor) == {c} and workload.tensors[u.tensor].role not in LASTING
        }  # fmt: skip
        made[c] = _kernel(workload, ops, gone, remade if c in whole else set())
    return replace(phase, ops=tuple(made[c] for c in order))


def _remade(
    workload: Workload, phase: Phase, readers: Mapping[str, set[int]], cluster: Sequence[int],
    whole: set[int],
) -> set[str]:  # fmt: skip
    """What attention saves for its backward only: fused kernels make it again instead."""
    writers: dict[str, set[int]] = {}
    for i, op in enumerate(phase.ops):
        for use in op.writes:
            writers.setdefault(use.tensor, set()).add(cluster[i])
    return {
        name for name, by in writers.items()
        if workload.tensors[name].role == "saved" and by | readers.get(name, set()) <= whole
    }  # fmt: skip


def _kernel(workload: Workload, ops: Sequence[Op], gone: set[str], remade: set[str]) -> Op:
    """One op that does what several do; what `gone` holds is not written, `remade` nor read."""
    written: set[str] = set()
    outer: list[Use] = []
    for op in ops:
        outer += [u for u in op.reads if u.tensor not in written | remade]
        written.update(u.tensor for u in op.writes)
    reads = _joined(workload, outer)
    writes = _joined(
        workload, [u for op in ops for u in op.writes if u.tensor not in gone | remade]
    )
    flops: Number = sum((op.flops for op in ops), start=0.0)
    rates: dict[str, Number] = {}
    for op in ops:
        for use in op.reads:
            rate = op.per_element.get(use.tensor)
            if rate is None:
                continue
            if use in reads:
                rates[use.tensor] = rates.get(use.tensor, 0.0) + rate
            else:
                flops = flops + rate * workload.tensors[use.tensor].elements(use.at)
    heavy = next((op for op in ops if op.kind not in FUSIBLE), None)
    if heavy is None:
        kind = _kind({op.kind for op in ops})
        return replace(
            ops[-1], kind=kind, reads=reads, writes=writes, flops=flops, per_element=rates
        )
    group, _, which = heavy.group.partition(":")
    name = f"{group}_backward" if which.endswith("backward") else group
    shape = {k: n for k, n in heavy.shape.items() if k != "causal"}
    return replace(
        heavy, name=name, kind=group, reads=reads, writes=writes, per_element=rates,
        flops=flops * heavy.shape.get("causal", 1.0), shape=shape, group="",
    )  # fmt: skip


def _kind(kinds: set[str]) -> str:
    """Class of a fused kernel; a row reduction with what scales the row is a norm."""
    if kinds & {"norm", "reduce"} and kinds != {"reduce"}:
        return "norm"
    return next(k for k in ("softmax", "reduce", "rope", "pointwise", "copy") if k in kinds)


def _joined(workload: Workload, uses: Iterable[Use]) -> tuple[Use, ...]:
    """Uses with those left out that touch no more of a tensor than another one does."""
    kept: list[Use] = []
    for use in uses:
        within = False
        for i, other in enumerate(kept):
            if other.tensor != use.tensor:
                continue
            if _covers(workload, other, use):
                within = True
                break
            if _covers(workload, use, other):
                kept[i] = use
                within = True
                break
        if not within:
            kept.append(use)
    return tuple(kept)


def _covers(workload: Workload, large: Use, small: Use) -> bool:
    """Whether one use touches at least as much along every axis as another."""
    if not large.at or large == small:
        return True
    if large.part is not None or small.part is not None:
        if large.part is None or small.part is None or large.part[2] != small.part[2]:
            return False
        if large.part[0] > small.part[0] or large.part[1] < small.part[1]:
            return False
    tensor = workload.tensors[large.tensor]
    for axis, extent in large.at.items():
        other = small.at.get(axis, tensor.extent(axis))
        if not np.all(np.asarray(np.minimum(extent, tensor.extent(axis))) >= other):
            return False
    return True
