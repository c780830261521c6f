"""Attention written out in several kernels, recognised in a list of ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from narrows.core.workload import FUSIBLE, Op, Phase, Workload
from narrows.trace.blocks import causal_sum


def mark_attention(workload: Workload, windows: Mapping[str, int] | None = None) -> Workload:
    """Every chain of product, softmax and product gets a group that the plan's `flash` merges.

    So does an attention in one op, with the copy that lays its heads side by side.
    windows: modules whose attention is causal, by path, with their sliding window (0 for
    none); where they get a mask, a fused kernel does only the visible scores (`causal` in the
    shape), while kernels written out, or given a mask to add, do the whole square.
    """
    phases = tuple(_marked(p, windows or {}) for p in workload.phases)
    return replace(workload, phases=phases)


def _marked(phase: Phase, windows: Mapping[str, int]) -> Phase:
    ops = list(phase.ops)
    writer = {u.tensor: i for i, op in enumerate(ops) for u in op.writes}
    readers: dict[str, list[int]] = {}
    for i, op in enumerate(ops):
        for use in op.reads:
            readers.setdefault(use.tensor, []).append(i)
    found = 0
    for i, op in enumerate(ops):
        if op.group:
            continue
        if op.kind == "softmax":
            up, first = _climb(ops, writer, i)
            down, second = _descend(ops, readers, i)
            if first is None or second is None:
                continue
            inside = {*up, i, *down, first, second}
            inside |= _copies(ops, writer, readers, (first, second))
        elif op.kind.startswith("attention"):
            first = second = i
            inside = {i, *_copies(ops, writer, readers, (i,))}
        else:
            continue
        inside |= _merges(ops, readers, second)
        shape = dict(ops[first].shape)
        queries, keys = shape.get("m", 1), shape.get("n", 1)
        kind = f"attention_{'decode' if queries == 1 else 'prefill'}"
        window = _window(op.name, windows)
        masked = op.kind == "softmax" or len(op.reads) > 3
        if window is not None and masked and queries == keys > 1:
            shape["causal"] = float(causal_sum(0.0, queries, window)) / queries**2
        elif len(inside) == 1:
            continue
        shape |= {"q": queries, "kv": keys, "channel": shape.get("k", 1)}
        for j in inside:
            ops[j] = replace(ops[j], group=f"{kind}:{found}")
        ops[first] = replace(ops[first], shape=shape)
        found += 1
    return replace(phase, ops=tuple(ops)) if found else phase


def _climb(ops: list[Op], writer: Mapping[str, int], i: int) -> tuple[list[int], int | None]:
    """From a softmax up through scaling, capping and masking to the product of the scores."""
    between: list[int] = []
    for _ in range(12):
        # The scores are the first operand; a mask is only ever added to them.
        above = [writer[u.tensor] for u in ops[i].reads if u.tensor in writer]
        above = [j for j in above if j < i]
        if not above:
            return between, None
        i = above[0]
        if ops[i].kind == "matmul":
            return between, None if ops[i].per_element else i
        if ops[i].kind not in FUSIBLE or ops[i].kind == "norm":
            return between, None
        between.append(i)
    return between, None


def _descend(
    ops: list[Op], readers: Mapping[str, list[int]], i: int
) -> tuple[list[int], int | None]:
    """From a softmax down through casts and dropout to the product with the values."""
    between: list[int] = []
    for _ in range(6):
        below = [j for u in ops[i].writes for j in readers.get(u.tensor, ()) if j > i]
        if not below:
            return between, None
        i = below[0]
        if ops[i].kind == "matmul":
            return between, None if ops[i].per_element else i
        if ops[i].kind not in FUSIBLE:
            return between, None
        between.append(i)
    return between, None


def _copies(
    ops: list[Op], writer: Mapping[str, int], readers: Mapping[str, list[int]],
    products: tuple[int, ...],
) -> set[int]:  # fmt: skip
    """Copies made for the products only: repeated heads, transposed operands."""
    found: set[int] = set()
    for i in products:
        for use in ops[i].reads:
            j = writer.get(use.tensor)
            if j is not None and ops[j].name.endswith("clone") and readers[use.tensor] == [i]:
                found.add(j)
    return found


def _merges(ops: list[Op], readers: Mapping[str, list[int]], i: int) -> set[int]:
    """The copy that lays the heads side by side again."""
    below = [j for u in ops[i].writes for j in readers.get(u.tensor, ())]
    return {j for j in below if len(below) == 1 and ops[j].name.endswith("clone")}


def _window(name: str, windows: Mapping[str, int]) -> int | None:
    """The window of the innermost causal module whose path an op's name starts with."""
    best = [path for path in windows if name.startswith(f"{path}.")]
    return windows[max(best, key=len)] if best else None
