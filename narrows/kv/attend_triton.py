"""Attention over packed keys and values as they lie, on a CUDA GPU (a Triton kernel).

One program reads a run of tokens of one KV head: codes are unpacked in registers, products are of
fp16 on tensor cores (of fp32 where the queries are), the runs are merged by log-sum-exp
(flash-decoding; Milakov and Gimelshein, arXiv 1805.02867). Codes are those of codec.Affine, keys
by channel and values by token. Importing this module needs triton, which comes with torch for
CUDA. Set TRITON_INTERPRET=1 before the import to run it on a processor, for tests.
"""

# what triton.jit makes of a function is not what its types say
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from narrows.kv.attend_packed import Partial, merge
from narrows.kv.codec import Packed

LEAST_ROWS = 16
"""Rows of the smallest product of tensor cores; fewer queries are filled up."""

PROGRAMS = 512
"""Programs to fill a GPU of a hundred multiprocessors several times over."""

RUN = 256
"""Fewest tokens of a program: below that starting it costs more than it reads."""


@triton.jit
def _attend(
    query, key_codes, key_scale, key_low, value_codes, value_scale, value_low, bias, out, total,
    heads, rows, tokens, each, scaling,
    query_batch, query_head,
    key_codes_batch, key_codes_head, key_scale_batch, key_scale_head,
    value_codes_batch, value_codes_head, value_scale_batch, value_scale_head,
    bias_batch, bias_head, bias_row,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_GROUP: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_GROUP: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Tokens run * each to (run + 1) * each of one head; strides are in elements.

    BLOCK tokens at a time, a divisor of KEY_GROUP. Byte j of a token holds channels j, j + WIDTH,
    j + 2 WIDTH, ..., the first in the lowest bits.
    """
    at, run = tl.program_id(0), tl.program_id(1)
    b, h = at // heads, at % heads
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    key_width: tl.constexpr = HEAD_DIM * KEY_BITS // 8
    value_width: tl.constexpr = HEAD_DIM * VALUE_BITS // 8
    groups: tl.constexpr = HEAD_DIM // VALUE_GROUP
    asked = tl.load(
        query + b * query_batch + h * query_head + row[:, None] * HEAD_DIM + channel[None, :],
        mask=row[:, None] < rows, other=0.0,
    )  # fmt: skip
    exact: tl.constexpr = asked.dtype == tl.float32
    key_codes += b * key_codes_batch + h * key_codes_head
    value_codes += b * value_codes_batch + h * value_codes_head
    key_scale += b * key_scale_batch + h * key_scale_head
    key_low += b * key_scale_batch + h * key_scale_head
    value_scale += b * value_scale_batch + h * value_scale_head
    value_low += b * value_scale_batch + h * value_scale_head
    high = tl.full([ROWS], -float("inf"), tl.float32)
    sum_ = tl.zeros([ROWS], tl.float32)
    made = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    end = tl.minimum((run + 1) * each, tokens)
    for begin in range(run * each, end, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        here = token < end
        # keys, transposed: (HEAD_DIM, BLOCK); a block lies in one group
        of = begin // KEY_GROUP * HEAD_DIM + channel
        scale = tl.load(key_scale + of).to(tl.float32)
        low = tl.load(key_low + of).to(tl.float32)
        byte = tl.load(
            key_codes + token[None, :] * key_width + (channel % key_width)[:, None],
            mask=here[None, :], other=0,
        )  # fmt: skip
        code = (byte >> (channel // key_width * KEY_BITS)[:, None]) & ((1 << KEY_BITS) - 1)
        keys = code.to(tl.float32) * scale[:, None] + low[:, None]
        if exact:
            scores = tl.dot(asked, keys, input_precision="ieee")
        else:
            scores = tl.dot(asked, keys.to(asked.dtype))
        scores = scores * scaling
        if BIASED:
            scores += tl.load(
                bias + b * bias_batch + h * bias_head + row[:, None] * bias_row + token[None, :],
                mask=(row[:, None] < rows) & here[None, :], other=0.0,
            )  # fmt: skip
        scores = tl.where(here[None, :], scores, -float("inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        against = tl.where(higher == -float("inf"), 0.0, higher)  # nothing visible yet
        weights = tl.exp(scores - against[:, None])
        shrink = tl.exp(high - against)
        sum_ = sum_ * shrink + tl.sum(weights, 1)
        high = higher
        # values: (BLOCK, HEAD_DIM)
        of = token[:, None] * groups + (channel // VALUE_GROUP)[None, :]
        step = tl.load(value_scale + of, mask=here[:, None], other=0.0).to(tl.float32)
        lowest = tl.load(value_low + of, mask=here[:, None], other=0.0).to(tl.float32)
        byte = tl.load(
            value_codes + token[:, None] * value_width + (channel % value_width)[None, :],
            mask=here[:, None], other=0,
        )  # fmt: skip
        code = (byte >> (channel // value_width * VALUE_BITS)[None, :]) & ((1 << VALUE_BITS) - 1)
        values = code.to(tl.float32) * step + lowest
        if exact:
            more = tl.dot(weights, values, input_precision="ieee")
        else:
            more = tl.dot(weights.to(asked.dtype), values.to(asked.dtype))
        made = made * shrink[:, None] + more
    seen = sum_ > 0
    made = made / tl.where(seen, sum_, 1.0)[:, None]
    place = (at * tl.num_programs(1) + run) * rows + row
    log = tl.where(seen, high + tl.log(tl.where(seen, sum_, 1.0)), -float("inf"))
    tl.store(total + place, log, mask=row < rows)
    tl.store(out + place[:, None] * HEAD_DIM + channel[None, :], made, mask=row[:, None] < rows)


def reads(queries: torch.Tensor, keys: Packed, values: Packed) -> bool:
    """Whether the kernel can attend these: sizes that are powers of two, affine codes."""
    key, value = keys.codec.loops("KEY"), values.codec.loops("VALUE")
    if key is None or value is None or "BLOCK_FLOAT" in key | value:
        return False
    sizes = queries.shape[3], key["KEY_GROUP"], value["VALUE_GROUP"]
    return all(n & (n - 1) == 0 for n in sizes) and sizes[0] >= 16 and sizes[1] >= 16


def packed(
    queries: torch.Tensor, keys: Packed, values: Packed, tokens: int,
    bias: torch.Tensor | None, scaling: float,
) -> Partial:  # fmt: skip
    """attend_packed.packed on a GPU; queries of fp32 are multiplied in fp32, others in fp16."""
    batch, heads, rows, size = queries.shape
    asked = queries.contiguous() if queries.dtype == torch.float32 else queries.half().contiguous()
    blocks = -(-tokens // RUN)
    runs = max(min(blocks, PROGRAMS // (batch * heads)), 1)
    each = -(-blocks // runs) * RUN
    runs = -(-tokens // each)
    out = torch.empty(batch, heads, runs, rows, size, device=queries.device)
    total = torch.empty(batch, heads, runs, rows, device=queries.device)
    block = min(keys.codec.group, 64)
    spread = (0, 0, 0)
    if bias is not None:
        bias = bias.float().contiguous()
        spread = tuple(
            stride if extent > 1 else 0
            for stride, extent in zip(bias.stride()[:3], bias.shape[:3], strict=True)
        )
    _attend[batch * heads, runs](
        asked, *keys.parts, *values.parts, asked if bias is None else bias, out, total,
        heads, rows, tokens, each, scaling,
        *asked.stride()[:2], *keys.parts[0].stride()[:2], *keys.parts[1].stride()[:2],
        *values.parts[0].stride()[:2], *values.parts[1].stride()[:2], *spread,
        HEAD_DIM=size, ROWS=max(triton.next_power_of_2(rows), LEAST_ROWS), BLOCK=block,
        KEY_BITS=keys.codec.bits, KEY_GROUP=keys.codec.group,
        VALUE_BITS=values.codec.bits, VALUE_GROUP=values.codec.group, BIASED=bias is not None,
    )  # fmt: skip
    return merge([(out[:, :, i], total[:, :, i]) for i in range(runs)])
