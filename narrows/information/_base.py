"""Exact discrete information, in bits: tables of probabilities, and tables of counts.

Everything here is vectorised over leading axes: a law is the last axis of an array, a joint table
p(x, y) its last two. Nothing is estimated: a figure is a property of the table given. `observed`
turns rows of symbols into such a table, and says what a finite sample can at most show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from narrows.core.errors import NarrowsError

MASS = 1e-9
"""How far probabilities may sum from 1."""


def law(p: np.ndarray | list[float] | tuple[float, ...], what: str = "law") -> np.ndarray:
    """Probabilities along the last axis, (..., n) float64, checked and normalised exactly.

    Raises NarrowsError for negative, infinite or missing mass.
    """
    p = np.asarray(p, np.float64)
    if p.ndim == 0 or p.shape[-1] == 0:
        raise NarrowsError(f"{what}: no probabilities given; give one for each symbol")
    if not np.isfinite(p).all() or (p < 0).any():
        raise NarrowsError(f"{what}: probabilities must be finite and not negative")
    total = p.sum(axis=-1, keepdims=True)
    if (np.abs(total - 1.0) > MASS).any():
        raise NarrowsError(
            f"{what}: probabilities must sum to 1, these sum to {float(total.reshape(-1)[0]):.12g}"
        )
    return p / total


def joint(p: np.ndarray, what: str = "joint table") -> np.ndarray:
    """A table p(x, y), (..., n, m), checked like a law."""
    p = np.asarray(p, np.float64)
    if p.ndim < 2:
        raise NarrowsError(f"{what}: needs two axes, one for each variable; it has {p.ndim}")
    return law(p.reshape(*p.shape[:-2], -1), what).reshape(p.shape)


def plogp(p: np.ndarray) -> np.ndarray:
    """-p log2 p, elementwise, 0 at 0."""
    return -p * np.log2(np.where(p > 0, p, 1.0))


def entropy(p: np.ndarray, axes: int = 1) -> np.ndarray:
    """Bits of a law (..., n), or of a joint table with `axes` 2; shape (...)."""
    return plogp(np.asarray(p, np.float64)).sum(axis=tuple(range(-axes, 0)))


def binary_entropy(p: np.ndarray | float) -> np.ndarray:
    """Bits of a coin with probabilities p and 1 - p, elementwise."""
    p = np.asarray(p, np.float64)
    return plogp(p) + plogp(1.0 - p)


def information(p: np.ndarray) -> np.ndarray:
    """I(X; Y) of joint tables (..., n, m), bits; shape (...). Never below 0.

    Summed as relative entropy to the product of the marginals, so that a small figure is not the
    difference of large ones.
    """
    p = np.asarray(p, np.float64)
    product = p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)
    seen = (p > 0) & (product > 0)  # the product of two tiny masses may underflow
    ratio = np.where(seen, p, 1.0) / np.where(seen, product, 1.0)
    return np.maximum((p * np.log2(ratio)).sum((-2, -1)), 0.0)


def equivocation(p: np.ndarray) -> np.ndarray:
    """H(X | Y) of joint tables p(x, y), bits: what Y leaves open of X; shape (...)."""
    return entropy(p, 2) - entropy(p.sum(-2))


def conditional(p: np.ndarray) -> np.ndarray:
    """p(y | x) of joint tables p(x, y), (..., n, m); rows of no mass are zero."""
    rows = p.sum(-1, keepdims=True)
    return np.divide(p, rows, out=np.zeros_like(p), where=rows > 0)


def through(p: np.ndarray, channel: np.ndarray) -> np.ndarray:
    """p(x, y) = sum over t of p(x, t) p(y | t): a joint table sent on through a channel.

    p: (..., n, k). channel: (..., k, m), rows are laws. Data processing: I(X; Y) <= I(X; T).
    """
    return np.asarray(p) @ np.asarray(channel)


def fano(bits_open: float, symbols: int) -> float:
    """Least probability of naming a symbol wrongly when `bits_open` of it are open: H(X | Y).

    Solves h(e) + e log2(symbols - 1) = bits_open for e, which is sharper than the usual
    (bits_open - 1) / log2(symbols).
    """
    if symbols < 2 or bits_open <= 0:
        return 0.0
    low, high = 0.0, 1.0 - 1.0 / symbols
    rest = np.log2(symbols - 1)
    if bits_open >= np.log2(symbols):
        return high
    for _ in range(80):
        middle = (low + high) / 2
        if binary_entropy(middle) + middle * rest < bits_open:
            low = middle
        else:
            high = middle
    return low


# --- what was observed -------------------------------------------------------------------------


def symbols(rows: np.ndarray) -> np.ndarray:
    """Equal rows to equal numbers: (n, d) integers to (n,) int64, small and not below 0."""
    rows = np.asarray(rows)
    if rows.ndim == 1:
        rows = rows[:, None]
    if not (np.issubdtype(rows.dtype, np.integer) or rows.dtype == bool):
        raise NarrowsError(
            f"symbols are whole numbers, not {rows.dtype}: a value of a continuous variable is "
            "never seen twice, so choose bins first"
        )
    rows = rows.astype(np.int64)
    least = rows.min(axis=0, initial=0)
    extent = rows.max(axis=0, initial=0) - least + 1
    code = np.zeros(len(rows), np.int64)
    size = 1.0
    for column, low, many in zip(rows.T, least, extent, strict=True):
        if size * float(many) >= 2**62:
            # the product of extents no longer fits: number anew what was seen so far
            code = np.unique(code, return_inverse=True)[1].astype(np.int64)
            size = float(code.max(initial=0) + 1)
            if size * float(many) >= 2**62:
                column, low = np.unique(column, return_inverse=True)[1], 0
                many = column.max(initial=0) + 1
        code = code * int(many) + (column - low)
        size *= float(many)
    if size <= 4 * len(rows) and rows.shape[1] == 1:
        return code
    return np.unique(code, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Seen:
    """Information between two observed symbols, bits, and what bounds it.

    value: of the table of counts. hx, hy: entropies of both. ceiling: the most that could have
    been read: min(hx, hy), itself at most log2 n. bias: Miller and Madow's first-order excess of
    `value` when the rows are a sample; 0 when they are the whole population. n: rows.
    """

    value: float
    hx: float
    hy: float
    ceiling: float
    bias: float
    n: int


def observed(x: np.ndarray, y: np.ndarray, population: bool) -> Seen:
    """I(X; Y) of n rows of symbols (n,) or (n, d), equally likely.

    population: the rows are all there is (every input once), so the figure is exact; otherwise
    they are a sample, and a plug-in figure is too high by about `bias`.
    """
    x, y = symbols(x), symbols(y)
    if len(x) != len(y) or len(x) == 0:
        raise NarrowsError(f"both variables need the same rows; there are {len(x)} and {len(y)}")
    n = len(x)
    both = np.bincount(symbols(x * (int(y.max()) + 1) + y))
    cx, cy = np.bincount(x), np.bincount(y)
    hx, hy, hxy = (float(entropy(c / n)) for c in (cx, cy, both))
    # H of a table of k cells is low by (k - 1) / 2n nats
    cells = [int(np.count_nonzero(c)) for c in (both, cx, cy)]
    bias = (cells[0] - cells[1] - cells[2] + 1) / (2 * n * np.log(2))
    value = min(max(hx + hy - hxy, 0.0), hx, hy)
    return Seen(value, hx, hy, min(hx, hy), 0.0 if population else max(float(bias), 0.0), n)
