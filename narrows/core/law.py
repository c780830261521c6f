"""Seconds of one kernel from its arithmetic, its bytes and its shape: the one calibrated law.

    plain   max(flops / (compute * peak), bytes / (memory * bandwidth)) + fixed
    tiled   for op classes whose calibration lists `tiles`, by the rules below

Tiles, waves, splits and the order of the blends are structure: facts of how such kernels are
built, the same for every machine. Only the constants of the calibration are fitted.

Products (`matmul`). A product of (m, k) by (k, n) is cut into output tiles, one processing unit
works on one at a time, and the last wave of tiles takes as long as a full one. Of the listed
tiles, and of 1, 2, 4 or 8 parts of k, the quickest is taken, as libraries do. A small tile reads
more for every operation, so it runs slower (HALF_PACE). Arithmetic and memory overlap only
partly, and `compute` is what the whole chip sustains (power, clocks) however full the waves are.
(Tiles, waves, splits: NVIDIA, "Matrix Multiplication Background User's Guide", and CUTLASS,
"Efficient GEMM".)

Attention over many queries (`attention_prefill`). The kernel walks whole tiles, those the mask
hides included, and each block of queries costs a `step` beside its keys. Kernels that skip what
the mask hides are the plain law.

Attention of single queries (`attention_decode`). One block a group of heads that share keys; two
blocks fit on a unit; too few blocks are split along the keys, and the parts are joined
(flash-decoding: Dao, Haziza, Massa and Sizov 2023).

Collectives. A ring runs through 1 to 2(p-1) hops, each of which costs a `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from narrows.core.calibration import Calibration
from narrows.core.tensor import Number

GEMM_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Output tiles of the tensor-core products in cuBLAS and CUTLASS (rows, columns)."""

FLASH_TILES = ((64, 64), (64, 128), (128, 64), (128, 128))
"""Query and key tiles of FlashAttention-2 (Dao 2023); one kernel has one of them."""

DECODE_TILES = ((1, 128),)
"""Keys a block takes at a time in FlashAttention-2's kernel for single queries."""

HALF_PACE = 32.0
"""Operations a byte (rows * columns / (rows + columns)) at which a tile runs at half pace."""

SPLITS = (1, 2, 4, 8)
"""Parts of k that are summed apart when there are too few tiles for all units."""

SHORTEST_PART = 128
"""No part of k is shorter."""

SUSTAIN = 4.0
"""Order of the smooth maximum of waves with `compute`; that of arithmetic with memory is 3."""

FILLED = 0.8
"""Below this share of busy units a kernel for single queries splits the keys."""

RESIDENT = 2
"""Blocks of the kernel for single queries that share one unit."""

REACH = 1.25
"""Times its fair share of the memory rate that one unit can draw."""

JOIN = 3.0
"""Steps that joining split keys costs."""

STRICT = 8.0
"""Order of the smooth maximum of the last wave with the memory rate."""

HOPS: Mapping[str, Callable[[Number], Number]] = {
    "all_reduce": lambda p: 2 * (p - 1),
    "all_gather": lambda p: p - 1,
    "reduce_scatter": lambda p: p - 1,
    "all_to_all": lambda p: p - 1,
    "send_recv": lambda p: 1.0,
}
"""Messages that follow each other in a collective over p ranks."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of an op: calibrated seconds of its arithmetic, of its bytes, of the dispatch, all.

    `seconds` is at least each of the parts.
    """

    compute: Number
    memory: Number
    fixed: Number
    seconds: Number


def _blend(a: Number, b: Number, order: float) -> Number:
    """A smooth maximum: at least the larger, at most their sum."""
    high, low = np.maximum(a, b), np.minimum(a, b)
    ratio = np.divide(low, high, out=np.zeros_like(high + low), where=np.asarray(high) > 0)
    return high * (1.0 + ratio**order) ** (1.0 / order)


def run(
    kind: str, least_compute: Number, least_memory: Number, shape: Mapping[str, Number],
    calibration: Calibration, units: int, work: Number | None = None, rate: float = 0.0,
) -> Run:  # fmt: skip
    """One run of an op class; all figures broadcast.

    least_compute, least_memory: seconds at the machine's own rates. shape: of the op; products
    have m, n, k and batch. Attention has q queries (m) of kv keys (n) with channel elements (k),
    batch is sequences times query heads, and groups sequences times heads of keys and values
    (batch * kv_heads / heads). units: processing units of the machine. work: flops behind
    least_compute. rate: bytes a second of the main memory, for what splitting adds.
    """
    c = calibration
    fixed: Number = c.fixed
    if kind in HOPS:
        fixed = fixed + c.step * HOPS[kind](shape.get("peers", 2))
    elif c.tiles and units > 0 and {"m", "n", "k"} <= shape.keys():
        if kind == "matmul":
            return _product(least_compute, least_memory, shape, c, units, rate)
        if kind == "attention_prefill":
            return _prefill(least_compute, least_memory, shape, c, units, work)
        if kind == "attention_decode":
            return _decode(least_compute, least_memory, shape, c, units)
    compute, memory = least_compute / c.compute, least_memory / c.memory
    return Run(compute, memory, fixed, np.maximum(compute, memory) + fixed)


def _size(shape: Mapping[str, Number], *names: str) -> np.ndarray:
    """The first of some sizes that a shape has, 1 where it has none; above zero."""
    found = np.asarray(next((shape[n] for n in names if n in shape), 1.0), float)
    return np.maximum(found, np.finfo(float).tiny)


def _stack(values: Sequence[float], axis: int, cases: int) -> np.ndarray:
    """Choices along one of two leading axes (tile, parts) before those of the cases."""
    shape = [1] * (2 + cases)
    shape[axis] = len(values)
    return np.array(values, float).reshape(shape)


def _product(
    least_compute: Number, least_memory: Number, shape: Mapping[str, Number], c: Calibration,
    units: int, rate: float,
) -> Run:  # fmt: skip
    m, n, k, batch = (_size(shape, s) for s in ("m", "n", "k", "batch"))
    cases = np.broadcast(m, n, k, batch, least_compute, least_memory).ndim
    choices = (len(c.tiles), len(SPLITS))
    rows, columns = (_stack([t[i] for t in c.tiles], 0, cases) for i in (0, 1))
    parts = _stack(SPLITS, 1, cases)
    reuse = rows * columns / (rows + columns)
    pace = reuse / (reuse + HALF_PACE)
    pace = pace / pace.max()
    depth = np.ceil(k / parts)
    tiles = np.ceil(m / rows) * np.ceil(n / columns) * batch
    a_wave = least_compute * (units / (m * n * k * batch)) * (rows * columns / pace)
    tiled = np.ceil(tiles * (parts / units)) * a_wave * depth
    memory = np.asarray(least_memory / c.memory)
    joined: Number = 0.0
    if rate:  # parts are kept in fp32, written and read once, at twice the rate of the memory
        joined = np.where(parts > 1, parts * (m * n * batch * (4 / rate)), 0.0)
    joined = np.where((parts > 1) & (depth < SHORTEST_PART), np.inf, joined)
    taken = np.cbrt(tiled * tiled * tiled + memory * memory * memory) + joined
    taken = taken.reshape(choices[0] * choices[1], *taken.shape[2:])
    tiled = np.broadcast_to(tiled, (*choices, *taken.shape[1:])).reshape(taken.shape)
    best = np.argmin(taken, axis=0)[None]
    quickest = np.take_along_axis(taken, best, axis=0)[0]
    waiting = np.take_along_axis(tiled, best, axis=0)[0]
    sustained = least_compute / c.compute
    compute = _blend(waiting, sustained, SUSTAIN)
    return Run(compute, memory, c.fixed, _blend(quickest, sustained, SUSTAIN) + c.fixed)


def _prefill(
    least_compute: Number, least_memory: Number, shape: Mapping[str, Number], c: Calibration,
    units: int, work: Number | None,
) -> Run:  # fmt: skip
    rows, columns = c.tiles[0]
    m, n, k = _size(shape, "q", "m"), _size(shape, "kv", "n"), _size(shape, "channel", "k")
    heads = _size(shape, "batch")
    blocks = np.ceil(m / rows) * heads
    square = 4.0 * blocks * rows * np.ceil(n / columns) * columns * k
    counted = square if work is None else np.where(np.asarray(work) > 0, work, square)
    padded = square / (4.0 * heads * m * n * k)
    # A causal mask hides at most half of the square; what a window hides is skipped.
    ratio = np.maximum(np.minimum(square / counted, 2.0 * padded), 1.0)
    compute = least_compute * ratio / c.compute + c.step * blocks / units
    memory = least_memory / c.memory
    return Run(compute, memory, c.fixed, np.maximum(compute, memory) + c.fixed)


def _decode(
    least_compute: Number, least_memory: Number, shape: Mapping[str, Number], c: Calibration,
    units: int,
) -> Run:  # fmt: skip
    groups = _size(shape, "groups", "batch")
    if "groups" not in shape and {"heads", "kv_heads"} <= shape.keys():
        groups = groups * _size(shape, "kv_heads") / _size(shape, "heads")
    split = groups < FILLED * units
    blocks = np.where(split, units, groups)
    full = np.floor(blocks / (RESIDENT * units)) * RESIDENT * units
    last = blocks - full
    alone = np.ceil(last / units) * units / blocks * least_memory / REACH
    drawn = last / blocks * least_memory / c.memory
    waves = full / blocks * least_memory / c.memory + _blend(alone, drawn, STRICT)
    passes = np.ceil(blocks / units) + JOIN * split
    memory = np.maximum(waves, least_memory / c.memory) + c.step * passes
    compute = least_compute / c.compute
    return Run(compute, memory, c.fixed, np.maximum(compute, memory) + c.fixed)
