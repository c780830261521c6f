"""Work of an op class from its shape, for layouts that give shapes only."""

from __future__ import annotations

import numpy as np

Figures = np.ndarray | float


def product(
    m: Figures, n: Figures, k: Figures, width: Figures, batch: Figures = 1.0
) -> tuple[Figures, Figures]:
    """Flops and bytes of `batch` products of (m, k) by (k, n), elements of `width` bytes."""
    return 2.0 * m * n * k * batch, (m * k + k * n + m * n) * batch * width


def attention(
    queries: Figures, keys: Figures, dim: Figures, heads: Figures, groups: Figures, width: Figures
) -> tuple[Figures, Figures]:
    """Flops and bytes of causal attention of the last `queries` of `keys` tokens.

    heads: sequences times query heads. groups: sequences times heads of keys and values. Counted
    are the keys each query sees (2 operations for the score and 2 for the sum, a channel each);
    queries, keys and values are read once and the result is written.
    """
    seen = queries * (keys - queries) + queries * (queries + 1) / 2
    flops = 4.0 * heads * dim * seen
    return flops, (2.0 * heads * queries + 2.0 * groups * keys) * dim * width


def heads_of(whole: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Heads a device holds when `parts` share them; a head is not cut."""
    return np.maximum(whole / parts, 1.0)
