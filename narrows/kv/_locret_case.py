"""A prompt read in chunks over a bounded cache, as a workload sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.kv._coded import cached
from narrows.kv.snapkv import KEYS, VALUES, _cut_decode


def facts(case: Case) -> Mapping[str, Any]:
    """What is known of the load, once it is clear that there is a cache to bound."""
    found = cached(case, "locret", "bound")
    if found.get("window"):
        raise NarrowsError(
            f"layers of {case.workload.name} have a sliding window, whose cache is bounded "
            "already; locret works on models that attend to everything"
        )
    return found


def chunked(work: Workload, budget: Number, chunk: float, width: int) -> Workload:
    """The workload with prefill in chunks and the cache cut to the budget; itself if it fits.

    Weights are read once a chunk; activations are a chunk long; a chunk attends to what is held.
    """
    prompt, before = work.facts["prompt"], work.tensors[KEYS].extent("token")
    kept = np.minimum(budget, before)
    active = np.asarray(before > kept)
    if not active.any():
        return work
    parts = np.where(active, np.maximum(np.asarray(prompt) / chunk, 1.0), 1.0)
    size = prompt / parts
    # a chunk sees itself and what is held, which is all of the prompt until the budget is reached
    keys = np.where(active, np.minimum(budget + size, prompt), prompt)
    made: dict[str, Tensor] = {}
    for t in work.tensors.values():
        if not t.name.startswith("prefill.") or not np.array_equal(
            np.broadcast_to(t.axes.get("token", -1), np.shape(prompt)), prompt
        ):
            continue
        made[t.name] = t.keep(token=size, **({"key": keys} if "key" in t.axes else {}))

    def shorter(value: Number) -> Number:
        return value / parts

    def used(use: Use) -> Use:
        at = {a: shorter(n) if a in ("token", "vocab") else n for a, n in (use.at or {}).items()}
        return replace(use, at=at) if use.at else use

    fresh = {u.tensor: op.reads[0].tensor for p in work.phases if p.name == "prefill"
             for op in p.ops for u in op.writes if u.tensor in (KEYS, VALUES)}  # fmt: skip
    heads = _heads(work, size, active, parts, width)
    ratio = keys / prompt if fresh else 1.0

    def prefill(op: Op) -> tuple[Op, ...]:
        touched = {u.tensor for u in (*op.reads, *op.writes)}
        if not touched & made.keys() or any(u.tensor == "prefill.logits" for u in op.writes):
            return (op,)
        wide = any("key" in made[t].axes for t in touched & made.keys())
        changed = replace(
            op, reads=tuple(map(used, op.reads)), writes=tuple(map(used, op.writes)),
            flops=shorter(op.flops) * (ratio if wide else 1.0),
            per_element={t: n if t in made else shorter(n) for t, n in op.per_element.items()},
            repeat=op.repeat * parts,
            shape={n: shorter(x) if n == "m" else x * ratio if wide and _is(x, prompt) else x
                   for n, x in op.shape.items()},
        )  # fmt: skip
        if {u.tensor for u in op.writes} & {KEYS}:
            return (*heads[1], changed)
        return (changed,)

    cut = _cut_decode(work, kept - before)

    def change(phase: Phase, op: Op) -> tuple[Op, ...]:
        return prefill(op) if phase.name == "prefill" else (cut.ops.get(id(op), op),)

    cache = [work.tensors[name].keep(token=kept) for name in (KEYS, VALUES)]
    return work.with_tensors([*made.values(), *heads[0], *cut.tensors, *cache]).map_ops(change)


def _is(value: Number, other: Number) -> bool:
    return bool(np.array_equal(np.asarray(value), np.asarray(other)))


def _heads(
    work: Workload, size: Number, active: Any, parts: Number, width: int
) -> tuple[list[Tensor], tuple[Op, ...]]:
    """The retaining heads' weights, and what scoring a chunk runs in each layer."""
    told = work.facts
    devices = told.get("devices", 1)
    layers, batch = told["layers"], told["batch"]
    kv_heads = told["kv_heads"] / devices
    wide = (told["heads"] / devices + 2 * kv_heads) * told["head_dim"]
    dtype = told.get("dtype", "fp32")
    codec = Codec.of(dtype if dtype in ("fp64", "fp32", "bf16", "fp16") else "bf16")
    on = np.asarray(active, float)
    axes = {"batch": batch, "token": size}
    tensors = [
        Tensor("locret.first", "weight", {"layer": layers, "out": width * on, "in": wide}, codec),
        Tensor("locret.second", "weight", {"layer": layers, "out": kv_heads * on, "in": width},
               codec),
        Tensor("locret.hidden", "activation", {**axes, "channel": width}, codec),
        Tensor("locret.scores", "activation", {**axes, "head": kv_heads}, Codec.of("fp32")),
    ]  # fmt: skip
    rows = batch * size
    first = Use("locret.first", {"layer": 1})
    second = Use("locret.second", {"layer": 1})
    hidden, scores = Use("locret.hidden"), Use("locret.scores")
    seen = tuple(Use(f"prefill.{n}") for n in ("q", "k", "v") if f"prefill.{n}" in work.tensors)
    each = layers * parts * on
    return tensors, (
        Op("locret.first", "matmul", (*seen, first), (hidden,), 2.0 * rows * wide * width,
           precision=dtype, repeat=each, shape={"m": rows, "n": width, "k": wide}),
        Op("locret.second", "matmul", (hidden, second), (scores,), 2.0 * rows * width * kv_heads,
           precision=dtype, repeat=each, shape={"m": rows, "n": kv_heads, "k": width}),
    )  # fmt: skip
