"""Minimum-plus arithmetic: the operation of dynamic programming, as a rate of its own.

A multiply-add does two operations in one instruction; an addition and a minimum do two in two,
unless the chip fuses them (DPX on Hopper). Both are measured by the same loops over the same
bytes, so that their ratio is the instruction's. `edit_distance` is a recurrence made of it: each
cell waits for its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from narrows.core.errors import NarrowsError


@dataclass(frozen=True, slots=True)
class Kernels:
    """minplus(a, b, c): c = min(c, min over k of a[i, k] + b[k, j]). multiply_add: c += a b.

    edit_distance(a, b, row): unit-cost distance of two sequences; row: (len(b) + 1,) scratch.
    """

    minplus: Callable[[np.ndarray, np.ndarray, np.ndarray], None]
    multiply_add: Callable[[np.ndarray, np.ndarray, np.ndarray], None]
    edit_distance: Callable[[np.ndarray, np.ndarray, np.ndarray], int]


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """The kernels; each is compiled when first called. Raises NarrowsError without numba."""
    try:
        import numba
    except ImportError:
        raise NarrowsError("minimum-plus loops need numba: pip install 'narrows[torch]'") from None

    @numba.njit(nogil=True, fastmath=True)
    def minplus(a, b, c):
        for i in range(a.shape[0]):
            for k in range(0, a.shape[1], 8):  # eight rows of b for one pass over a row of c
                s, t, u, v = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
                w, x, y, z = a[i, k + 4], a[i, k + 5], a[i, k + 6], a[i, k + 7]
                for j in range(b.shape[1]):
                    total = min(c[i, j], s + b[k, j])
                    total = min(total, t + b[k + 1, j])
                    total = min(total, u + b[k + 2, j])
                    total = min(total, v + b[k + 3, j])
                    total = min(total, w + b[k + 4, j])
                    total = min(total, x + b[k + 5, j])
                    total = min(total, y + b[k + 6, j])
                    c[i, j] = min(total, z + b[k + 7, j])

    @numba.njit(nogil=True, fastmath=True)
    def multiply_add(a, b, c):
        for i in range(a.shape[0]):
            for k in range(0, a.shape[1], 8):  # eight rows of b for one pass over a row of c
                s, t, u, v = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
                w, x, y, z = a[i, k + 4], a[i, k + 5], a[i, k + 6], a[i, k + 7]
                for j in range(b.shape[1]):
                    total = c[i, j] + s * b[k, j]
                    total = total + t * b[k + 1, j]
                    total = total + u * b[k + 2, j]
                    total = total + v * b[k + 3, j]
                    total = total + w * b[k + 4, j]
                    total = total + x * b[k + 5, j]
                    total = total + y * b[k + 6, j]
                    c[i, j] = total + z * b[k + 7, j]

    @numba.njit(nogil=True)
    def edit_distance(a, b, row):
        for j in range(row.size):
            row[j] = j
        for i in range(a.size):
            corner = row[0]
            row[0] = i + 1
            for j in range(b.size):
                above = row[j + 1]
                swap = corner + (0 if a[i] == b[j] else 1)
                row[j + 1] = min(swap, min(above, row[j]) + 1)
                corner = above
        return row[b.size]

    return Kernels(minplus, multiply_add, edit_distance)


DEPTH = 16
"""Inner extent of the timed products: their second operand then stays in the first cache."""


def operands(side: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """fp32 matrices (side, DEPTH), (DEPTH, side) and (side, side)."""
    rng = np.random.default_rng(seed)
    shapes = ((side, DEPTH), (DEPTH, side), (side, side))
    a, b, c = (rng.random(shape, np.float32) for shape in shapes)
    return a, b, c


def operations(a: np.ndarray, b: np.ndarray) -> float:
    """Operations of one product: an addition (or product) and a minimum (or sum) a step."""
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
