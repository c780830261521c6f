"""A cache made smaller along its axes: the four ways of the long-context analysis, and its codec.

The cache is one tensor with axes layer, head, token and channel. Every technique that compresses
it keeps less of one of them or codes its elements shorter; bytes follow from the tensor, so
fractions on different axes multiply, and what a former technique left is what they act on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload

PROMPT = "kv.prompt."
"""Tokens are dropped of the prompt only; what is generated stays."""

ALL = 1.0


@dataclass(frozen=True, slots=True)
class Kept:
    """Shares of the cache that are kept, in (0, 1].

    layer: caches that are stored; layers share the others (every layer still reads one, so that
    traffic stays). head: key-value heads, with the queries they serve. token: of the prompt.
    hidden: channels of a head. bits: of an element (with the scales), None for the cache's own.
    """

    layer: float = ALL
    head: float = ALL
    token: float = ALL
    hidden: float = ALL
    bits: float | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "head", "token", "hidden"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                raise NarrowsError(f"compress: {name} is a share kept, in (0, 1], not {share!r}")
        if self.bits is not None and not self.bits > 0:
            raise NarrowsError(f"compress: bits of an element must be above 0, not {self.bits!r}")


def compress(
    work: Workload, layer: float = ALL, head: float = ALL, token: float = ALL,
    hidden: float = ALL, bits: float | None = None,
) -> Workload:  # fmt: skip
    """The workload with less of its key-value cache kept; see Kept. Whole units, rounded up.

    Raises NarrowsError for a share outside (0, 1] and for a workload without a cache.
    """
    kept = Kept(layer, head, token, hidden, bits)
    caches = work.role("kv")
    if not caches:
        raise NarrowsError(f"{work.name} keeps no key-value cache, so there is none to compress")
    if kept == Kept():
        return work
    after = work.with_tensors(_kept(t, kept) for t in caches)
    return _follow(work, after, layer)


def _kept(tensor: Tensor, kept: Kept) -> Tensor:
    shares = {"layer": kept.layer, "head": kept.head, "channel": kept.hidden}
    if tensor.name.startswith(PROMPT):
        shares["token"] = kept.token
    extents = {
        axis: np.ceil(share * tensor.extent(axis) - 1e-9)
        for axis, share in shares.items() if share < 1
    }  # fmt: skip
    made = tensor.keep(**extents)
    return made if kept.bits is None else made.with_(codec=Codec(f"{kept.bits:g} bit", kept.bits))


def _follow(before: Workload, after: Workload, layer: float) -> Workload:
    """Writes of shared layers, and scores over fewer heads and keys, follow the cache."""
    scores = _scores(before, after)
    after = after.with_tensors(scores.values())

    def written(use: Use) -> Use:
        if after.tensors[use.tensor].role != "kv" or "layer" not in use.at:
            return use
        return replace(use, at={**use.at, "layer": use.at["layer"] * layer})

    def change(phase: Phase, op: Op) -> tuple[Op, ...]:
        made = replace(op, writes=tuple(written(u) for u in op.writes))
        if phase.name != "decode":
            return (made,)
        smaller = [u.tensor for u in op.writes if u.tensor in scores]
        if smaller:
            name = smaller[0]
            share = scores[name].elements() / before.tensors[name].elements()
            made = replace(made, flops=op.flops * share)
        seen = next((scores[u.tensor] for u in (*op.reads, *op.writes) if u.tensor in scores), None)
        return (made if seen is None else replace(made, shape=_shape(op, before, seen)),)

    return after.map_ops(change)


def _shape(op: Op, before: Workload, seen: Tensor) -> Mapping[str, Number]:
    """Sizes of a kernel over the scores `seen`: keys and heads as many as are left."""
    old = before.tensors[seen.name]
    heads = seen.extent("head") / old.extent("head")
    keys = old.extent("key")
    made: dict[str, Number] = {}
    for name, size in op.shape.items():
        if name in ("n", "k", "kv") and np.array_equal(size, keys):
            made[name] = seen.extent("key")
        elif name in ("batch", "heads", "kv_heads"):
            made[name] = size * heads
        else:
            made[name] = size
    return made


def _scores(before: Workload, after: Workload) -> dict[str, Tensor]:
    """Decode's activations over keys, cut as the caches are that their attention group reads."""
    found: dict[str, Tensor] = {}
    groups: dict[str, tuple[Number, float]] = {}
    ops = [op for p in before.phases if p.name == "decode" for op in p.ops]
    for op in ops:
        for use in op.reads:
            old, new = before.tensors[use.tensor], after.tensors[use.tensor]
            if old.role == "kv" and use.tensor.startswith(PROMPT) and op.group not in groups:
                seen = use.at.get("token", old.extent("token"))
                fewer = np.minimum(seen, old.extent("token")) - np.minimum(
                    seen, new.extent("token")
                )
                groups[op.group] = fewer, float(new.extent("head") / old.extent("head"))
    for op in ops:
        if op.group not in groups:
            continue
        fewer, heads = groups[op.group]
        for use in (*op.reads, *op.writes):
            tensor = before.tensors[use.tensor]
            if "key" in tensor.axes and use.tensor not in found:
                found[use.tensor] = tensor.keep(
                    key=tensor.extent("key") - fewer, head=tensor.extent("head") * heads
                )
    return found
