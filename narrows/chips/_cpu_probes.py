"""The counterparts of the GPU's probes on this processor, one thread.

Every function gives samples (repeats, rounds): each sample is the fastest of a few short slices,
for what disturbs a shared machine lasts longer than a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np

from narrows.chips import _minplus, _pchase
from narrows.core.errors import NarrowsError, unknown
from narrows.measure import probes
from narrows.measure.engines import engine
from narrows.measure.kernels import compiled
from narrows.measure.timing import Clock, inner_calls

SLICE = 2e-4
MAIN = "dram"


def seconds(call: Callable[[], object], repeats: int, rounds: int, slices: int = 6) -> np.ndarray:
    """Seconds of a call (repeats, rounds)."""
    clock = Clock()
    call()
    inner = inner_calls(clock, call, SLICE)
    found = np.empty((repeats, rounds))
    for index in np.ndindex(found.shape):
        least = np.inf
        for _ in range(slices):
            begin = perf_counter()
            for _ in range(inner):
                call()
            least = min(least, (perf_counter() - begin) / inner)
        found[index] = least
    return found


def footprints() -> dict[str, int]:
    """Bytes that lie well inside each level, by its name, nearest first; main memory last.

    A quarter of the listed size (what is listed only chooses where to look), more than the
    level before it. Raises NarrowsError where the system lists no caches.
    """
    listed = probes.caches(1)
    if not listed:
        raise NarrowsError("the system lists no caches: give sweep() your own footprints")
    found: dict[str, int] = {}
    before = 0
    for cache in listed:
        found[cache.name] = max(cache.size // 4, 2 * before)
        before = cache.size
    found[MAIN] = int(min(4 * before, (probes.memory_available() or 1e18) / 8))
    return found


def at(level: str) -> int:
    """The footprint of a level by its name."""
    known = footprints()
    if level not in known:
        raise unknown("memory level", level, known)
    return known[level]


def latency(size: int, repeats: int, rounds: int) -> np.ndarray:
    """Cycles of a dependent load over `size` bytes."""
    return _pchase.Chaser(rounds).samples(size, repeats)


def read(size: int, repeats: int, rounds: int) -> np.ndarray:
    """Seconds of a byte when `size` bytes are summed again and again."""
    loops = compiled()
    if loops is None:
        raise NarrowsError("reading a cache needs numba: pip install 'narrows[torch]'")
    words = _pchase.room(max(size // 64, 1) * 64).view(np.float32)
    words.fill(1.0)
    times = max(2, (1 << 21) // words.nbytes)  # a small footprint must not cost its call
    return seconds(lambda: loops.read(words, times), repeats, rounds) / (times * words.nbytes)


def product(precision: str, side: int, repeats: int, rounds: int) -> np.ndarray:
    """Seconds of an operation of a square product; torch, or numpy without it."""
    with _one_thread():
        call = engine("cpu", 1).product(precision, side, side, side)
        return seconds(call, repeats, rounds) / (2.0 * side**3)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread, and as it was afterwards: several wait for the slowest."""
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def arithmetic(name: str, side: int, repeats: int, rounds: int) -> np.ndarray:
    """Seconds of an operation of `minplus` or `multiply_add`."""
    kernel = getattr(_minplus.kernels(), name)
    a, b, c = _minplus.operands(side)
    return seconds(lambda: kernel(a, b, c), repeats, rounds) / _minplus.operations(a, b)


def recurrence(length: int, repeats: int, rounds: int) -> np.ndarray:
    """Seconds of a cell of an edit distance of two random sequences over four letters."""
    kernel = _minplus.kernels().edit_distance
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 4, length) for _ in range(2))
    row = np.zeros(length + 1, np.int64)
    return seconds(lambda: kernel(a, b, row), repeats, rounds) / length**2
