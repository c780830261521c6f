"""Dependent loads and dependent additions on this processor (numba).

The chase follows indices: an address is the value of the load before it, so loads cannot overlap,
and the order is random, so no prefetcher helps. The clock is a chain of one addition and one
exclusive-or, each of which takes one cycle on every processor of today: cycles are counted by it,
next to the chase, and no boost clock is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

import numpy as np

from narrows.chips._cache_inference import shuffled
from narrows.core.errors import NarrowsError
from narrows.measure.timing import interleave

CLOCK_STEPS = 50_000
CYCLES = 2
"""Cycles of a step of the clock's chain."""

PAGE = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Loops:
    """chase(next, at, steps): the index after so many loads. clock(x, steps): the chain."""

    chase: Callable[[np.ndarray, int, int], int]
    clock: Callable[[int, int], int]


@lru_cache(maxsize=1)
def loops() -> Loops:
    """The loops, compiled now. Raises NarrowsError without numba."""
    try:
        import numba
    except ImportError:
        raise NarrowsError("dependent loads need numba: pip install 'narrows[torch]'") from None

    unsigned = numba.types.uint64
    row = numba.types.Array(unsigned, 1, "C")

    # unsigned: numba would test every signed index for being negative
    @numba.njit(unsigned(row, unsigned, unsigned), nogil=True)
    def chase(successor, at, steps):
        for _ in range(steps):
            at = successor[at]
        return at

    @numba.njit(unsigned(unsigned, unsigned), nogil=True)
    def clock(x, steps):
        for i in range(steps):
            x = (x + np.uint64(i)) ^ np.uint64(0x9E3779B97F4A7C15)
        return x

    return Loops(chase, clock)


def room(size: int) -> np.ndarray:
    """uint64 words of `size` bytes, touched, at the start of a (huge) page."""
    raw = np.zeros(size + PAGE, np.uint8)
    begin = -raw.ctypes.data % PAGE
    return raw[begin : begin + size].view(np.uint64)


class Chaser:
    """A probe of this processor: cycles of a dependent load.

    rounds: readings of which the median counts. slices: of each reading; the fastest of them
    counts, for what disturbs a slice (another process, an interrupt) lasts longer than it does.
    steps: loads of a slice.
    """

    granule = 8

    def __init__(self, rounds: int = 5, slices: int = 6, steps: int = 20_000) -> None:
        self.rounds = rounds
        self.slices = slices
        self.steps = steps

    def cycles(self, offsets: np.ndarray, rounds: int = 0) -> np.ndarray:
        """Cycles of a load, a figure for each round (rounds,), chase and clock in turn."""
        compiled = loops()
        order = np.asarray(offsets, np.int64)
        if len(order) == 0 or (order % self.granule).any() or order.min() < 0:
            raise NarrowsError("offsets to chase are multiples of 8 bytes from 0, at least one")
        words = room(int(order.max()) + 64)
        words[order // 8] = np.roll(order, -1) // 8
        # the laps that fill the caches are not read; of a long ring a part is enough
        at = compiled.chase(words, int(order[0]) // 8, min(2 * len(order), 500_000))
        compiled.clock(1, CLOCK_STEPS)
        found = np.empty(rounds or self.rounds)
        for i in range(len(found)):
            chased, ticked = np.inf, np.inf
            for _ in range(self.slices):
                begin = perf_counter()
                at = compiled.chase(words, at, self.steps)
                middle = perf_counter()
                compiled.clock(1, CLOCK_STEPS)
                end = perf_counter()
                chased, ticked = min(chased, middle - begin), min(ticked, end - middle)
            found[i] = chased / self.steps * CLOCK_STEPS * CYCLES / ticked
        return found

    def latency(self, offsets: np.ndarray) -> float:
        """Median cycles of a load over a cyclic visit."""
        return float(np.median(self.cycles(offsets)))

    def samples(self, size: int, repeats: int, stride: int = 64) -> np.ndarray:
        """Cycles over a footprint of `size` bytes: (repeats, rounds), a new order each repeat."""
        count = max(size // stride, 1)
        return np.stack([self.cycles(shuffled(count, stride, seed)) for seed in range(repeats)])


def hertz(rounds: int = 15) -> np.ndarray:
    """Cycles a second of the clock's chain, by round."""
    compiled = loops()
    timed = interleave(
        {"clock": lambda: compiled.clock(1, CLOCK_STEPS)}, repeats=rounds, min_seconds=1e-3
    )
    return CLOCK_STEPS * CYCLES / timed["clock"].seconds
