"""Attention over packed keys and values as they lie, and the merge with what is not packed.

Each part of a cache gives its attention and the log of its sum of exponentials; `merge` joins
them to the softmax over all (Milakov and Gimelshein, arXiv 1805.02867). A few queries go through
attend_packed.c, which takes recent tokens in full precision along, or on a GPU through
attend_triton.py; many queries, other codecs and devices, and systems without a compiler go block
by block through torch. None unpacks the whole cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from narrows.kv import native
from narrows.kv.codec import Codec, Packed

FEW = 16
"""Most queries a KV head for which the C loops beat unpacked blocks and a matrix product."""

BLOCK = 2048
"""Tokens that the block by block path unpacks at a time."""

SOURCE = Path(__file__).with_suffix(".c")

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention over a part, (batch, kv_heads, rows, head_dim) fp32, and its log sum, (..., rows)."""


def packed(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    tokens: int,
    bias: torch.Tensor | None,
    scaling: float,
) -> Partial:
    """Attention over the first `tokens` of packed keys and values.

    queries: (batch, kv_heads, rows, head_dim), all that share a KV head; fp32, or on a GPU the
    model's own. keys may hold more tokens. bias: added to the scores, (batch or 1, kv_heads or 1,
    rows or 1, >= tokens) fp32.
    """
    run = _loops(queries, keys, values)
    if run is not None:
        return _run(run, queries, keys, values, tokens, bias, scaling)
    if queries.is_cuda and queries.shape[2] <= FEW and find_spec("triton") is not None:
        from narrows.kv import attend_triton

        if attend_triton.reads(queries, keys, values):
            return attend_triton.packed(queries, keys, values, tokens, bias, scaling)
    return blocks(queries, keys, values, tokens, bias, scaling)


def fused(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    recent: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor | None:
    """Attention over packed tokens and those in full behind them, in one pass of the C loops.

    recent: keys and values in full, (batch, kv_heads, tokens, head_dim). There may be more packed
    keys than packed values or fewer, but as many of both in all. Other shapes as in `packed`. None
    where there are no loops for these: the parts are then attended one by one and merged.
    """
    if any(x.dtype != torch.float32 or x.stride(3) != 1 or x.stride(2) != x.shape[3]
           for x in recent):  # fmt: skip
        return None
    run = _loops(queries, keys, values)
    if run is None:
        return None
    tokens = keys.tokens + recent[0].shape[2]
    recent = keys.codec.ordered(recent[0]).contiguous(), recent[1]
    return _run(run, queries, keys, values, tokens, bias, scaling, recent)[0]


def _loops(queries: torch.Tensor, keys: Packed, values: Packed) -> Any:
    """The C loops for these, None where there are none or a matrix product is faster."""
    if queries.device.type != "cpu" or queries.shape[2] > FEW:
        return None
    return compiled(queries.shape[3], queries.shape[2], keys.codec, values.codec)


def blocks(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    tokens: int,
    bias: torch.Tensor | None,
    scaling: float,
) -> Partial:
    """`packed` in plain torch, BLOCK tokens unpacked at a time."""
    block = max(keys.codec.block, values.codec.block)
    step = max(BLOCK // block, 1) * block
    parts: list[Partial] = []
    for begin in range(0, tokens, step):
        end = min(begin + step, tokens)
        key, value = (
            x.span(begin, -(-end // x.codec.block) * x.codec.block) for x in (keys, values)
        )
        scores = key.codec.scores(queries.float() * scaling, key)[..., : end - begin]
        weights, total = _softmax(scores, None if bias is None else bias[..., begin:end])
        weights = torch.nn.functional.pad(weights, (0, value.tokens - (end - begin)))
        parts.append((value.codec.mix(weights, value), total))
    return merge(parts)


def dense(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> Partial:
    """Attention over plain keys and values; shapes as in `packed`. Zero where all is hidden."""
    weights, total = _softmax((queries.float() * scaling) @ keys.float().transpose(2, 3), bias)
    return weights @ values.float(), total


def _softmax(scores: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, zero where all is hidden, and the log of the sum of exponentials."""
    if bias is not None:
        scores = scores + bias
    total = scores.logsumexp(-1)
    return (scores - total.unsqueeze(-1).clamp(min=torch.finfo(torch.float32).min)).exp(), total


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over several parts together."""
    if len(parts) == 1:
        return parts[0]
    totals = torch.stack([total for _, total in parts])
    total = totals.logsumexp(0)
    weights = (totals - total.clamp(min=torch.finfo(torch.float32).min)).exp().unsqueeze(-1)
    out = (torch.stack([out for out, _ in parts]) * weights).sum(0)
    return out, total


@cache
def compiled(head_dim: int, rows: int, keys: Codec, values: Codec) -> Any:
    """The C loops for one shape and codecs; None where there are none or no compiler."""
    key, value = keys.loops("KEY"), values.loops("VALUE")
    if key is None or value is None or ("BLOCK_FLOAT" in key) != ("BLOCK_FLOAT" in value):
        return None
    built = native.library(SOURCE, **{"HEAD_DIM": head_dim, "ROWS": rows, **key, **value})
    if built is None:
        return None
    built.attend.argtypes = [ctypes.POINTER(Job), ctypes.c_long, ctypes.c_long]
    built.attend.restype = None
    return built.attend


class Place(ctypes.Structure):
    """Where a tensor of (batch, heads, ...) begins, and bytes from one to the next of either."""

    _fields_ = (("at", ctypes.c_void_p), ("batch", ctypes.c_long), ("head", ctypes.c_long))

    @classmethod
    def of(cls, t: torch.Tensor) -> Place:
        """Of a tensor whose last two axes are contiguous; one entry may stand for all."""
        size = t.element_size()
        batch = t.stride(0) * size if t.shape[0] > 1 else 0
        return cls(t.data_ptr(), batch, t.stride(1) * size if t.shape[1] > 1 else 0)


PLACES = (
    "query", "key_codes", "key_scale", "key_minimum", "value_codes", "value_scale",
    "value_minimum", "keys", "values", "bias",
)  # fmt: skip
PARTS = {what: [f"{what}_{part}" for part in ("codes", "scale", "minimum")]
         for what in ("key", "value")}  # fmt: skip
"""What parts of packed tokens are there; an exponent is a scale, without a minimum."""

COUNTS = (
    "batch", "heads", "tokens", "packed_keys", "packed_values", "parts", "each", "bias_row",
)  # fmt: skip


class Job(ctypes.Structure):
    """What the loops are asked; see attend_packed.c."""

    _fields_ = (
        *((name, Place) for name in PLACES),
        ("out", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in COUNTS),
        ("scaling", ctypes.c_float),
    )


ALONE = 2048
"""Tokens of all heads together up to which a second thread costs more than it saves."""


def _run(
    run: Any, queries: torch.Tensor, keys: Packed, values: Packed, tokens: int,
    bias: torch.Tensor | None, scaling: float,
    recent: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Partial:  # fmt: skip
    """The C loops over all heads, as many at once as torch would use threads.

    tokens: to attend to; those beyond the packed ones are in `recent`.
    Where heads are fewer than threads, each head's tokens are divided and merged.
    """
    batch, heads, rows, size = queries.shape
    queries = keys.codec.ordered(queries).contiguous()
    bias = None if bias is None else bias.contiguous()
    workers = torch.get_num_threads() if batch * heads * tokens > ALONE else 1
    per = max(keys.codec.block, values.codec.block)
    parts = max(min(-(-workers // (batch * heads)), tokens // (8 * per)), 1)
    each = max(-(-tokens // (parts * per)), 1) * per
    parts = max(-(-tokens // each), 1)
    out = torch.empty(parts, batch, heads, rows, size)
    totals = torch.empty(parts, batch, heads, rows)
    job = Job(Place.of(queries))
    held = (
        *zip(PARTS["key"], keys.parts, strict=False),
        *zip(PARTS["value"], values.parts, strict=False),
    )
    for name, t in (*held, *zip(("keys", "values"), recent or (), strict=False)):
        setattr(job, name, Place.of(t))
    job.out, job.total, job.scaling = out.data_ptr(), totals.data_ptr(), scaling
    job.batch, job.heads, job.tokens, job.parts, job.each = batch, heads, tokens, parts, each
    job.packed_keys, job.packed_values = min(keys.tokens, tokens), min(values.tokens, tokens)
    if bias is not None:
        job.bias = Place.of(bias)
        job.bias_row = bias.stride(2) if bias.shape[2] > 1 else 0
    asked = ctypes.byref(job)
    native.shared(lambda first, last: run(asked, first, last), parts * batch * heads, workers)
    return merge([(out[i], totals[i]) for i in range(parts)])
