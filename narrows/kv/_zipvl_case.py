"""Prefill attention among some tokens as a workload sees it, and how those are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload


def sparse(work: Workload, share: float, probes: int) -> Workload:
    """Prefill attention over `share` of the tokens, and what choosing them by `probes` computes."""
    prefill = next((p for p in work.phases if p.name == "prefill"), None)
    square = {t.name for t in work.tensors.values() if {"token", "key"} <= t.axes.keys()
              and t.name.startswith("prefill.")}  # fmt: skip
    ops: tuple[Op, ...] = () if prefill is None else prefill.ops
    first = next((op for op in ops if {u.tensor for u in op.writes} & square and op.reads), None)
    if first is None:
        return work
    cut = [
        work.tensors[n].keep(
            token=work.tensors[n].extent("token") * share,
            key=work.tensors[n].extent("key") * share,
        )
        for n in square
    ]
    made, probing = _probing(work, first, probes)

    def change(phase: Phase, op: Op) -> tuple[Op, ...]:
        uses = {u.tensor for u in (*op.reads, *op.writes)}
        if phase.name != "prefill" or not uses & square:
            return (op,)
        less = _cut(op, square, work.tensors, share)
        return (*probing, less) if op is first else (less,)

    return work.with_tensors([*cut, *made]).map_ops(change)


def _cut(op: Op, square: set[str], tensors: Mapping[str, Tensor], share: float) -> Op:
    """An op of attention over `share` of queries and keys: the square of its work."""
    tokens = op.shape.get("kv")

    def some(use: Use) -> Use:
        axes = tensors[use.tensor].axes
        if use.tensor in square or "token" not in axes:
            return use
        kept = tensors[use.tensor].extent("token") * share
        return replace(use, at={**use.at, "token": kept})

    shape = {
        n: x * share if tokens is not None and np.array_equal(x, tokens) else x
        for n, x in op.shape.items()
    }
    reads, writes = (tuple(some(u) for u in uses) for uses in (op.reads, op.writes))
    return replace(op, flops=op.flops * share**2, shape=shape, reads=reads, writes=writes)


def _probing(work: Workload, first: Op, count: int) -> tuple[list[Tensor], tuple[Op, ...]]:
    """Scores of the probes, what is made of them, and the important tokens gathered."""
    facts, cache = work.facts, work.tensors["kv.prompt.key"]
    prompt, size, batch = facts["prompt"], facts["head_dim"], cache.extent("batch")
    heads = facts["heads"] / facts.get("devices", 1)
    probes = np.minimum(count, prompt)
    fp32, each = Codec.of("fp32"), first.repeat
    rows = {"head": heads, "query": probes, "token": prompt}
    made = [
        Tensor("zipvl.scores", "activation", rows, fp32),
        Tensor("zipvl.weights", "activation", rows, fp32),
        Tensor("zipvl.sums", "activation", {"batch": batch, "token": prompt}, fp32),
        Tensor("zipvl.order", "activation", {"batch": batch, "token": prompt},
               Codec.of("int64")),
    ]  # fmt: skip
    scores, weights, sums, order = (Use(t.name) for t in made)
    keys = first.reads[-1]
    flops = 2.0 * heads * probes * prompt * size
    kv_heads = cache.extent("head")
    shape = {"m": probes * heads / kv_heads, "n": prompt, "k": size, "batch": kv_heads}
    some = replace(keys, at={**keys.at, "batch": 1})
    rowwise = each * batch
    return made, (
        Op("zipvl.scores", "matmul", (some,), (scores,), flops,
           precision=facts.get("dtype", "fp32"), repeat=rowwise, shape=shape),
        Op("zipvl.softmax", "softmax", (scores,), (weights,), 0.0, {scores.tensor: 5.0},
           repeat=rowwise),
        Op("zipvl.sum", "reduce", (weights,), (Use(sums.tensor, {"batch": 1}),), 0.0,
           {weights.tensor: 1.0}, repeat=rowwise),
        # two sorts: by the sum for how many, by the normalised sum for which
        Op("zipvl.order", "reduce", (sums,), (order,), 0.0,
           {sums.tensor: 2.0 * np.log2(np.maximum(prompt, 2))}, repeat=each),
    )  # fmt: skip
