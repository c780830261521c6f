"""Micro-benchmarks of a CUDA GPU through torch and triton. Asked only where there is one.

Every function gives seconds, an array over rounds, of calls that took turns where two of them
are compared. Nothing here knows what a chip should do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from narrows.chips._cache_inference import shuffled
from narrows.core.errors import NarrowsError
from narrows.measure.engines import Torch
from narrows.measure.timing import Clock, Timings, interleave

MIB = 1024 * 1024
BLOCK = 1024
PROGRAMS = 2048
PASSES = 8
Call = Callable[[], object]


def _torch() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise NarrowsError("this probe needs a CUDA GPU, and torch sees none; use backend='cpu'")
    return torch


def _kernels() -> Any:
    try:
        from narrows.chips import _gpu_kernels
    except ImportError:
        raise NarrowsError("this probe needs triton: pip install triton") from None
    return _gpu_kernels


def timed(calls: Mapping[str, Call], rounds: int, min_seconds: float = 2e-3) -> Timings:
    """The calls, in turn, by events on the device."""
    return interleave(calls, repeats=rounds, min_seconds=min_seconds, device="cuda")


def read_main(size: int) -> dict[str, Call]:
    """Ways to read `size` bytes once: our kernel, and torch's sum."""
    torch = _torch()
    words = size // 4
    programs = -(-words // (BLOCK * PASSES))
    source = torch.ones(words, dtype=torch.int32, device="cuda")
    out = torch.empty(programs, dtype=torch.int32, device="cuda")
    kernel = _kernels().read_all
    floats = source.view(torch.float32)
    return {
        "triton": lambda: kernel[(programs,)](source, out, words, BLOCK=BLOCK, PASSES=PASSES),
        "torch": lambda: torch.sum(floats),
    }


def read_footprint(size: int) -> tuple[Call, float]:
    """Reads random blocks of 4 KiB among `size` bytes; the call, and bytes it moves."""
    torch = _torch()
    blocks = size // (4 * BLOCK)
    times = max(64, -(-8 * blocks // PROGRAMS))  # each block eight times over, so that none is left
    source = torch.ones(blocks * BLOCK, dtype=torch.float32, device="cuda")
    out = torch.empty(PROGRAMS * BLOCK, dtype=torch.float32, device="cuda")
    kernel = _kernels().read_blocks
    return (lambda: kernel[(PROGRAMS,)](source, out, blocks, times, BLOCK=BLOCK)), (
        4.0 * BLOCK * PROGRAMS * times
    )


def capacity(sizes: np.ndarray, cost: np.ndarray) -> tuple[float, float, float]:
    """Bytes of a cache from the cost of a byte at random places of growing footprints.

    What fits costs `near`; of a larger footprint the part capacity / size is found near, the
    rest far. Least squares over (near, far) for every capacity among the sizes, finely spaced.
    Returns (capacity, near, far). Raises NarrowsError where cost does not rise.
    """
    sizes, cost = np.asarray(sizes, float), np.asarray(cost, float)
    best: tuple[float, float, float, float] | None = None
    for guess in np.geomspace(sizes[1], sizes[-2], 400):
        missed = np.maximum(0.0, 1.0 - guess / sizes)
        table = np.stack([1.0 - missed, missed], axis=1)
        # relative errors: a slow footprint must not outweigh a fast one
        (near, far), *_ = np.linalg.lstsq(table / cost[:, None], np.ones(len(cost)), rcond=None)
        rest = float((((table @ (near, far)) / cost - 1.0) ** 2).sum())
        if best is None or rest < best[0]:
            best = rest, float(guess), float(near), float(far)
    assert best is not None
    if best[3] < 1.1 * best[2]:
        raise NarrowsError("no cache to be seen: far bytes cost as much as near ones")
    return best[1], best[2], best[3]


def knee(rounds: int, largest: int = 512 * MIB) -> tuple[np.ndarray, np.ndarray]:
    """Footprints (sizes,) and seconds a byte (sizes, rounds) of random reads over each."""
    sizes = (4 * MIB * 2.0 ** np.arange(0, np.log2(largest / (4 * MIB)) + 0.1, 0.25)).astype(int)
    sizes = sizes // (4 * BLOCK) * (4 * BLOCK)
    rows: list[np.ndarray] = []
    for size in sizes:
        call, moved = read_footprint(int(size))
        rows.append(timed({"read": call}, rounds)["read"].seconds / moved)
    return sizes, np.stack(rows)


def load_seconds(size: int, rounds: int, stride: int = 128, seed: int = 0) -> np.ndarray:
    """Seconds of one dependent load over `size` bytes, by round: pointer chase of one program."""
    torch = _torch()
    order = shuffled(max(size // stride, 2), stride // 8, seed)
    host = np.zeros(int(order.max()) + 1, np.int64)
    host[order] = np.roll(order, -1)
    successor = torch.from_numpy(host).cuda()
    out = torch.empty(1, dtype=torch.int64, device="cuda")
    kernel = _kernels().chase
    # two lengths: launch and first touch are in both, and cancel
    short, long = len(order), 3 * len(order)
    if len(order) > 100_000:
        short, long = 10_000, 60_000
    elif len(order) < 4_000:
        short, long = 4_000, 24_000
    clock = Clock("cuda")
    done = 0

    def run(steps: int) -> float:
        nonlocal done
        # goes on where the last one stopped, or a long ring's beginning would be cached
        start = int(order[done % len(order)])
        done += steps
        return clock.read(lambda: kernel[(1,)](successor, out, start, steps, num_warps=1), 1)

    run(long)  # compiles, and fills the caches
    run(short)
    return np.array([(run(long) - run(short)) / (long - short) for _ in range(rounds)])


def product(precision: str, side: int) -> Call:
    """A square product in one precision; `fp8` is e4m3 with scales of one, summed in fp32."""
    torch = _torch()
    if precision != "fp8":
        return Torch("cuda").product(precision, side, side, side)
    a, b = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    columns = b.t()  # the second operand has to lie by columns

    def run() -> object:
        return torch._scaled_mm(
            a, columns, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    try:
        run()
    except (RuntimeError, AttributeError) as error:
        told = str(error).split("\n", 1)[0]
        raise NarrowsError(f"no product in fp8 on this GPU ({told})") from None
    return run


def cast_product(side: int) -> Call:
    """The fp8 product with the cast of its first operand from bf16, as a layer would run it."""
    torch = _torch()
    inner = torch.randn(side, side, device="cuda").to(torch.bfloat16)
    weight = torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")

    def run() -> object:
        scale = inner.abs().amax().float() / 448.0  # the largest e4m3
        cast = (inner / scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            cast, weight, scale_a=scale, scale_b=one, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip

    return run


def crossover(sizes: np.ndarray, ratio: np.ndarray) -> float | None:
    """Size from which a ratio of seconds stays below one, between sizes by logarithms; or None."""
    sizes, ratio = np.asarray(sizes, float), np.asarray(ratio, float)
    above = np.flatnonzero(ratio >= 1.0)
    if len(above) == 0:
        return float(sizes[0])
    last = int(above[-1])
    if last + 1 == len(sizes):
        return None
    high, low = np.log(ratio[last]), np.log(ratio[last + 1])
    part = high / (high - low)
    return float(np.exp(np.log(sizes[last]) * (1 - part) + np.log(sizes[last + 1]) * part))


def copy(direction: str, size: int = 256 * MIB) -> Call:
    """A copy of `size` bytes: `h2d` and `d2h` from and to pinned memory, or `d2d`."""
    torch = _torch()

    def make(device: str) -> Any:
        pinned = device == "cpu"
        return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)

    ends = {"h2d": ("cpu", "cuda"), "d2h": ("cuda", "cpu"), "d2d": ("cuda", "cuda")}
    if direction not in ends:
        raise NarrowsError(f"a copy goes h2d, d2h or d2d, not {direction!r}")
    source, target = (make(device) for device in ends[direction])
    return lambda: target.copy_(source, non_blocking=True)


def arithmetic(name: str, dtype: str = "int32", steps: int = 2000) -> tuple[Call, float]:
    """`minplus` or `multiply_add` in registers; the call, and operations it makes."""
    torch = _torch()
    kernel = getattr(_kernels(), name)
    block, programs = 256, 8192
    source = torch.ones(block * programs, dtype=getattr(torch, dtype), device="cuda")
    out = torch.empty_like(source)
    return (lambda: kernel[(programs,)](source, out, steps, BLOCK=block)), (
        2.0 * 4 * steps * block * programs
    )
