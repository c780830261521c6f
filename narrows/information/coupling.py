"""The two halves of a coupling with a bottleneck: an encoder of limited entropy, and a decoder.

Encoder (entropy-bounded information maximisation): max I(X; T) with H(T) <= R. Decoder (minimum
entropy coupling): the joint table of T and Y, with their laws given, of least entropy. Both are
hard to solve exactly; both greedy answers are within a proven distance. All in bits.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

import numpy as np

from narrows.core.errors import NarrowsError, unknown
from narrows.information._base import binary_entropy, entropy, law, plogp

EXACT_SYMBOLS = 5
"""Up to here every map of symbols to columns is tried when refining (52 of them)."""

SLACK = 1e-12
"""Bits by which an entropy may exceed its budget: rounding, nothing else."""

SEEK = ("max", "zero")
"""How the greedy coupling picks its next pair of symbols."""


@dataclass(frozen=True)
class Encoder:
    """How each symbol of X is coded.

    p: law of X, (n,). column: code symbol of each, (n,) int. moved: (symbol, column, mass) of the
    one symbol that is split between two columns, where the map was refined.
    """

    p: np.ndarray
    column: np.ndarray
    moved: tuple[int, int, float] | None = None

    @property
    def columns(self) -> int:
        """Number of code symbols."""
        extra = 0 if self.moved is None else self.moved[1] + 1
        return max(int(self.column.max()) + 1, extra)

    @property
    def code_law(self) -> np.ndarray:
        """p(t), (columns,)."""
        q = np.bincount(self.column, self.p, self.columns)
        if self.moved is not None:
            symbol, to, mass = self.moved
            q[self.column[symbol]] -= mass
            q[to] += mass
        return np.maximum(q, 0.0)

    @property
    def rate(self) -> float:
        """H(T), bits."""
        return float(entropy(self.code_law))

    @property
    def information(self) -> float:
        """I(X; T), bits: H(T), less what the split symbol leaves to chance."""
        if self.moved is None:
            return self.rate
        symbol, _, mass = self.moved
        own = float(self.p[symbol])
        return self.rate - own * float(binary_entropy(mass / own))

    @property
    def channel(self) -> np.ndarray:
        """p(t | x), (n, columns)."""
        table = np.zeros((len(self.p), self.columns))
        table[np.arange(len(self.p)), self.column] = 1.0
        if self.moved is not None:
            symbol, to, mass = self.moved
            share = mass / self.p[symbol]
            table[symbol, self.column[symbol]] -= share
            table[symbol, to] += share
        return table

    @property
    def table(self) -> np.ndarray:
        """p(x, t), (n, columns)."""
        return self.p[:, None] * self.channel


def encode(p: np.ndarray, bits: float, refine: bool = False) -> Encoder:
    """The encoder of law p (n,) with H(T) <= bits and I(X; T) close to the most there can be.

    Greedy (algorithm 1): merge the two smallest columns if that is enough, else the two largest,
    and go on; `bits - I` is then at most h(p2), the binary entropy of the second largest mass.
    O(n log n). refine: split one symbol between two columns (theorem 3) so that the budget is
    used up; exact in all cases tried for n = 3.
    Raises NarrowsError for a negative budget.
    """
    p = law(p, "source")
    if not bits >= 0:
        raise NarrowsError(f"code budget must be at least 0 bits, not {bits!r}")
    if float(entropy(p)) <= bits + SLACK:
        return Encoder(p, np.arange(len(p)))
    found, before = _greedy(p, bits)
    if not refine:
        return Encoder(p, found)
    maps = _partitions(len(p)) if len(p) <= EXACT_SYMBOLS else iter((found, before))
    best = Encoder(p, found)
    for column in maps:
        for trial in _split(p, column, bits):
            if trial.information > best.information:
                best = trial
    return best


def _greedy(p: np.ndarray, bits: float) -> tuple[np.ndarray, np.ndarray]:
    """Columns (n,) of the greedy map, and those of the map one merge before it.

    The two largest columns are always the merged block and the next symbol, so the whole search
    is one pass over prefix sums of the sorted masses.
    """
    order = np.argsort(-p, kind="stable")
    order = order[p[order] > 0]
    m = len(order)
    mass = p[order]
    block = np.cumsum(mass)
    parts = plogp(mass)
    rest = np.append(np.cumsum(parts[::-1])[::-1][1:], 0.0)
    large = plogp(block) + rest  # [k]: entropy with the k + 1 largest in one column
    small = np.zeros(m)  # the same, with the two smallest columns merged as well
    if m > 2:
        pair = plogp(mass[-2] + mass[-1]) - parts[-2] - parts[-1]
        small[: m - 2] = large[: m - 2] + pair
    by_small = int(np.argmax(small <= bits + SLACK))
    by_large = int(np.argmax(large <= bits + SLACK))
    take_small = by_small <= by_large - 1
    k = by_small if take_small else by_large

    def columns(size: int, tail: bool) -> np.ndarray:
        rank = np.maximum(np.arange(m) - size, 0)
        if tail:
            rank[-1] = rank[-2]
        out = np.zeros(len(p), np.int64)
        out[order] = rank
        return out

    return columns(k, take_small), columns(k if take_small else k - 1, False)


def _partitions(n: int) -> Iterator[np.ndarray]:
    """All maps of n symbols to columns, each once."""

    def grow(done: list[int], used: int) -> Iterator[list[int]]:
        if len(done) == n:
            yield done
            return
        for column in range(used + 1):
            yield from grow([*done, column], max(used, column + 1))

    for columns in grow([], 0):
        yield np.array(columns)


def _split(p: np.ndarray, column: np.ndarray, bits: float) -> Iterator[Encoder]:
    """A map and its neighbours with H(T) at the budget: one symbol's mass moved in part.

    From below the budget mass goes to an empty column, from above to the heaviest column.
    """
    q = np.bincount(column, p)
    here = float(entropy(q))
    if here <= bits + SLACK:
        yield Encoder(p, column)
        # the cell with the least share of its column gains most for the rate it costs
        share = np.where((p > 0) & (p < q[column]), p / q[column], np.inf)
        cells = np.flatnonzero(np.isfinite(share))
        if len(p) > EXACT_SYMBOLS and len(cells):
            cells = cells[[int(np.argmin(share[cells]))]]
        to = len(q)
    else:
        cells = np.flatnonzero((p > 0) & (column != int(np.argmax(q))))
        if len(p) > EXACT_SYMBOLS:
            lightest = cells[q[column[cells]] == q[column[cells]].min()]
            cells = lightest[[int(np.argmin(p[lightest]))]]
        to = int(np.argmax(q))
    padded = np.append(q, 0.0)
    for i in cells:
        own, source, target = float(p[i]), float(q[column[i]]), float(padded[to])

        fixed = here - _term(source) - _term(target)
        grid = np.linspace(0.0, own, 65)
        moved = plogp(np.maximum(source - grid, 0.0)) + plogp(target + grid)
        over = fixed + moved > bits
        for k in np.flatnonzero(over[1:] != over[:-1]):
            inside, outside = (grid[k + 1], grid[k]) if over[k] else (grid[k], grid[k + 1])
            inside, outside = float(inside), float(outside)
            for _ in range(60):
                middle = (inside + outside) / 2
                if fixed + _term(source - middle) + _term(target + middle) > bits:
                    outside = middle
                else:
                    inside = middle
            if 0 < inside < own:
                yield Encoder(p, column, (int(i), to, float(inside)))


def _term(p: float) -> float:
    """-p log2 p of one number."""
    return -p * log2(p) if p > 0 else 0.0


def quantiser(p: np.ndarray, bits: float, by: str = "index") -> Encoder:
    """The usual baseline: floor(2^bits) cells over the symbol's number.

    by: `index`, the paper's uniform quantiser (algorithm 5), cells of equal numbers of symbols;
    or `probability`, cells of equal mass, which follow the law and are the stronger peer.
    """
    p = law(p, "source")
    if by not in ("index", "probability"):
        raise unknown("cells of a quantiser", by, ("index", "probability"))
    cells = max(1, min(int(2.0**bits + 1e-9), len(p)))
    place = np.arange(len(p)) / len(p) if by == "index" else np.cumsum(p) - p / 2
    return Encoder(p, np.minimum((place * cells + 1e-9).astype(np.int64), cells - 1))


# --- decoder -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coupling:
    """A joint table of two given laws, as its nonzero cells.

    rows, columns: (cells,) int. mass: (cells,), above zero. shape: lengths of the two laws.
    """

    rows: np.ndarray
    columns: np.ndarray
    mass: np.ndarray
    shape: tuple[int, int]

    @property
    def entropy(self) -> float:
        """Joint entropy, bits."""
        return float(plogp(self.mass).sum())

    @property
    def table(self) -> np.ndarray:
        """p(x, y), of `shape`."""
        table = np.zeros(self.shape)
        np.add.at(table, (self.rows, self.columns), self.mass)
        return table


def couple(p: np.ndarray, q: np.ndarray, seek: str = "max") -> Coupling:
    """A coupling of laws p (n,) and q (m,) of small joint entropy, at most n + m - 1 cells.

    seek: `max` takes the largest mass left of each law, puts the smaller of the two in their cell
    and subtracts it (algorithm 3; O((n + m) log(n + m)); within log2(e)/e = 0.531 bits of the
    least there can be: Compton et al. 2023). `zero` takes the pair that uses up most and leaves
    least: the greatest min(p, q) - |p - q| (after algorithm 4; O((n + m) n m)).
    """
    p, q = law(p, "first law"), law(q, "second law")
    if seek not in SEEK:
        raise unknown("way to seek a coupling", seek, SEEK)
    cells = _max_seeking(p, q) if seek == "max" else _zero_seeking(p, q)
    rows, columns, mass = (np.array(c) for c in zip(*cells, strict=True))
    return Coupling(rows, columns, mass, (len(p), len(q)))


def _max_seeking(p: np.ndarray, q: np.ndarray) -> list[tuple[int, int, float]]:
    # masses negated, for a heap gives its least
    left = [(-v, i) for i, v in enumerate(p.tolist()) if v > 0]
    right = [(-v, j) for j, v in enumerate(q.tolist()) if v > 0]
    heapq.heapify(left)
    heapq.heapify(right)
    cells: list[tuple[int, int, float]] = []
    while left and right:
        (a, i), (b, j) = left[0], right[0]
        if a < b:
            cells.append((i, j, -b))
            heapq.heapreplace(left, (a - b, i))
            heapq.heappop(right)
        else:
            cells.append((i, j, -a))
            heapq.heappop(left)
            if b < a:
                heapq.heapreplace(right, (b - a, j))
            else:
                heapq.heappop(right)
    return cells


def _zero_seeking(p: np.ndarray, q: np.ndarray) -> list[tuple[int, int, float]]:
    p, q = p.copy(), q.copy()
    rows, columns = np.flatnonzero(p > 0), np.flatnonzero(q > 0)
    cells: list[tuple[int, int, float]] = []
    while len(rows) and len(columns):
        a, b = p[rows][:, None], q[columns][None, :]
        worth = 2 * np.minimum(a, b) - np.maximum(a, b)
        r, c = np.unravel_index(int(np.argmax(worth)), worth.shape)
        i, j = int(rows[r]), int(columns[c])
        mass = min(float(p[i]), float(q[j]))
        cells.append((i, j, mass))
        p[i] -= mass
        q[j] -= mass
        if p[i] <= 0:
            rows = np.delete(rows, r)
        if q[j] <= 0:
            columns = np.delete(columns, c)
    return cells


def meet(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The greatest law that both p and q majorise; its entropy bounds every coupling from below.

    (Cicalese, Gargano and Vaccaro 2019, fact 1.)
    """
    n = max(len(p), len(q))
    sums = [np.cumsum(np.sort(np.pad(law(v), (0, n - len(v))))[::-1]) for v in (p, q)]
    return np.maximum(np.diff(np.minimum(*sums), prepend=0.0), 0.0)
