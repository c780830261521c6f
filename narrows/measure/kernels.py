"""Loops that no array library offers: a triad inside a cache, and a chase of pointers.

Compiled by numba with the global lock released, so that one Python thread a core runs them at
once. `compiled` gives None where numba is not installed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from time import perf_counter

import numpy as np


@dataclass(frozen=True, slots=True)
class Loops:
    """The compiled loops.

    triad(a, b, c, times): a = b + 3 c over whole arrays, again and again. read(a, times): the sum
    of an array, again and again. chase(next, steps): follows indices, one load after another.
    """

    triad: Callable[..., object]
    read: Callable[[np.ndarray, int], object]
    chase: Callable[[np.ndarray, int], object]


def compiled() -> Loops | None:
    """The loops, compiled now (about two seconds); None without numba."""
    try:
        import numba
    except ImportError:
        return None

    one, three = np.float32(1.0), np.float32(3.0)  # plain literals would widen to float64

    @numba.njit(nogil=True, fastmath=True)
    def triad(a, b, c, times):  # numba infers
        for _ in range(times):
            for i in range(a.size):
                a[i] = b[i] + three * c[i]

    @numba.njit(nogil=True, fastmath=True)
    def read(a, times):
        total = one
        for t in range(times):
            part = one
            # a start that depends on t keeps the compiler from hoisting the inner loop
            for i in range(t & 1, a.size):
                part += a[i]
            total += part
        return total

    @numba.njit(nogil=True)
    def chase(successor, steps):
        at = 0
        for _ in range(steps):
            at = successor[at]
        return at

    tiny = np.ones(16, np.float32)
    triad(tiny, tiny.copy(), tiny.copy(), 1)
    read(tiny, 1)
    chase(np.zeros(2, np.int64), 1)
    return Loops(triad, read, chase)


def together(call: Callable[[int], object], threads: int) -> float:
    """Seconds until `threads` Python threads have each finished call(index)."""
    crew = [Thread(target=call, args=(i,), daemon=True) for i in range(threads)]
    begin = perf_counter()
    for member in crew:
        member.start()
    for member in crew:
        member.join()
    return perf_counter() - begin


def plain_pages(elements: int, dtype: type[np.generic]) -> np.ndarray:
    """An array of ones in pages of the usual size, as torch gets them. numpy asks for huge ones,
    which hide what it costs to translate addresses."""
    size = max(elements, 1) * np.dtype(dtype).itemsize
    # private, because shared pages are kept elsewhere; where there is no such choice, they are
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    )
    made = np.frombuffer(mmap.mmap(-1, size, **private), dtype)
    made.fill(1)
    return made


def ring(elements: int, seed: int = 0) -> np.ndarray:
    """Indices that visit `elements` cache lines in one random cycle: int64, a line (64 B) each."""
    line = 8
    order = np.random.default_rng(seed).permutation(elements)
    successor = plain_pages(elements * line, np.int64)
    successor[order * line] = np.roll(order, -1) * line
    return successor
