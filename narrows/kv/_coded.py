"""A cache in codes as a workload sees it: bytes by the mean of its tokens, and what codes cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from narrows.core.tensor import Codec, Number
from narrows.core.workload import Op, Workload

PARTS = ("prompt", "new")
"""The cache of a closed form or a trace: `kv.prompt.*` and `kv.new.*`, keys and values."""

STEPS = 512
"""Decode steps that means are taken over: evenly spaced, all of a shorter generation."""

UNPACK, RANGE, PACK = 2.0, 2.0, 4.0
"""Operations an element: mask, convert; least, largest; subtract, divide, round, shift."""

Shares = dict[tuple[str, str], Number]


def in_full(
    prompt: Number, generate: Number, kept: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> Shares:
    """Shares of tokens in full precision, mean over decode steps, by (part, `key` or `value`).

    kept: recent tokens in full by what they are, given the tokens seen. Arrays over cases work.
    """
    prompt, generate = np.broadcast_arrays(np.asarray(prompt, float), np.asarray(generate, float))
    # generated tokens at each step; without any the cache is as prefill left it
    made = np.floor(np.linspace(0, 1, STEPS) * np.maximum(generate - 1, 0)[..., None])
    found: Shares = {}
    for what, full in kept(prompt[..., None] + made).items():
        counts = {"new": np.minimum(full, made), "prompt": np.maximum(full - made, 0)}
        for part, of in (("prompt", prompt), ("new", made.mean(-1))):
            tokens = counts[part].mean(-1)
            share = np.divide(tokens, of, out=np.ones_like(tokens), where=of > 0)
            found[part, what] = float(share) if share.ndim == 0 else share
    return found


def coded(work: Workload, name: str, shares: Shares, bits: dict[str, float]) -> Workload:
    """The workload with its cache in codes of so many bits (scales included) by key and value.

    shares: see in_full. The same workload where the cache is coded so already.
    """
    changed: dict[str, Any] = {}
    for (part, what), share in shares.items():
        tensor = work.tensors.get(f"kv.{part}.{what}")
        if tensor is None or tensor.codec.name == name:
            continue
        full = tensor.codec.bits_per_element
        mean: Any = min(bits[what], full) * (1 - share) + full * share
        changed[tensor.name] = tensor.with_(codec=Codec(name, mean))
    if not changed:
        return work
    return work.with_tensors(changed.values()).map_ops(lambda _, op: _computing(op, changed))


def _computing(op: Op, changed: dict[str, Any]) -> tuple[Op, ...]:
    """An op with what unpacking its reads or packing its writes computes.

    Packing passes over its source twice: for the least and largest of a group, then for codes.
    A product with codes is no library's matrix product but a kernel that streams the cache, so it
    is priced as the attention kernels are, whether its neighbours are fused to it or not.
    """
    rates = {u.tensor: UNPACK for u in op.reads if u.tensor in changed}
    if rates:
        more = {name: op.per_element.get(name, 0.0) + rate for name, rate in rates.items()}
        kind = "attention_decode" if op.kind == "matmul" else op.kind
        return (replace(op, kind=kind, per_element={**op.per_element, **more}),)
    if not any(u.tensor in changed for u in op.writes):
        return (op,)
    source = op.reads[0]
    ranges = Op(
        f"{op.name}.range", "reduce", (source,), per_element={source.tensor: RANGE},
        repeat=op.repeat,
    )  # fmt: skip
    return ranges, replace(op, kind="pointwise", per_element={source.tensor: PACK})
