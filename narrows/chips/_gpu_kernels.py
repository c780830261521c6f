"""Triton kernels of the GPU probes: dependent loads, reads of a footprint, minimum-plus.

Importing this module needs triton, which comes with torch for CUDA. Set TRITON_INTERPRET=1 before
the import to run the kernels on a processor, for tests.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def chase(successor, out, start, steps):
    """Follow int64 indices: one program, each address the value loaded before it."""
    at = tl.load(successor + start)
    for _ in range(steps):
        at = tl.load(successor + at)
    tl.store(out, at)


@triton.jit
def read_blocks(source, out, blocks, times, BLOCK: tl.constexpr):
    """Each program sums `times` blocks of fp32 chosen at random among `blocks`."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(times):
        # a hash of (program, i), in 64 bits so that nothing overflows: no cache is favoured
        mixed = (program.to(tl.int64) * times + i) * 2654435761
        mixed = (mixed ^ (mixed >> 15)) & 0x7FFFFFFF
        total += tl.load(source + (mixed % blocks) * BLOCK + lane)
    tl.store(out + program * BLOCK + lane, total)


@triton.jit
def read_all(source, out, count, BLOCK: tl.constexpr, PASSES: tl.constexpr):
    """Sum of int32 words, each read once: PASSES blocks to a program."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(PASSES):
        at = (program * PASSES + i) * BLOCK + lane
        total += tl.load(source + at, mask=at < count, other=0)
    tl.store(out + program, tl.sum(total, 0))


@triton.jit
def minplus(source, out, steps, BLOCK: tl.constexpr):
    """`steps` dependent min(x + a, b) on each of four independent values: no memory in the loop."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(source + lane)
    b = a * 3 + 1000000
    w, x, y, z = a, a + 1, a + 2, a + 3
    for _ in range(steps):
        w = tl.minimum(w + a, b)
        x = tl.minimum(x + a, b)
        y = tl.minimum(y + a, b)
        z = tl.minimum(z + a, b)
    tl.store(out + lane, w + x + y + z)


@triton.jit
def multiply_add(source, out, steps, BLOCK: tl.constexpr):
    """The same with x * a + b."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(source + lane)
    b = a * 3 + 1000000
    w, x, y, z = a, a + 1, a + 2, a + 3
    for _ in range(steps):
        w = w * a + b
        x = x * a + b
        y = y * a + b
        z = z * a + b
    tl.store(out + lane, w + x + y + z)
