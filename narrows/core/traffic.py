"""Words that exact attention must move through a fast memory, and words that programs do move.

Model (Saha and Ye 2024, arXiv:2402.07443, after Hong and Kung 1981): a fast memory of M words in
front of a slow one that holds Q, K, V and receives O; arithmetic sees only the fast memory; cost
is words loaded plus words stored. For n queries, n keys and d channels the paper shows
Theta(n^2 d^2 / M) for M >= d^2 and Theta(n^2 d / sqrt(M)) below.

Lower bound, with constants (derived here; ordinary multiplication, any order, recomputation
allowed). Cut a run into segments of T transfers. A segment can use at most M + T words that were
there or are loaded, and leave at most M + T that stay or are stored; the two add up to 2M + T.

- Scores made from nothing else within the segment need whole rows of Q and of K. With x, y, z
  words of Q, K, V there are at most x*y/d products for them and x*z/d that use them:
  altogether (M + T)^2 / (4 d), d the channels of the queries.
- All other scores are a word that comes from before or outlasts the segment. By Loomis and
  Whitney (1949) their products of both kinds are at most ((2M + T) / 3)^(3/2).

So a segment does at most h(T), the sum of the two, of the `pairs * (dim_k + dim_v)` products,
and T * (ceil(products / h(T)) - 1) words must move, whatever T; the best T is taken. Never less
than reading Q, K, V and writing O once. For large n this is 2 n^2 d^2 / M beyond d^2 and
2.8 n^2 d / sqrt(M) below; the programs reach 4 of each, and two more words a score below.

Everything broadcasts over arrays, so that a sweep over cases is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.core.tensor import Number

SCRATCH = 2
"""Words a program needs beside its tiles: a row's new maximum and its rescaling."""

LEAST_MEMORY = 7
"""Words below which no program here runs: tiles of one element, and what goes with them."""

_SEGMENTS = np.geomspace(0.25, 256.0, 41)
"""Lengths of a segment that are tried, in multiples of the fast memory."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention: queries that share keys and values (with grouped heads: all of the group).

    queries, keys: rows. dim_k, dim_v: channels of queries and keys, and of values and outputs.
    pairs: scores that are really needed; all of them where it is None (causal: about half).
    """

    queries: Number
    keys: Number
    dim_k: Number
    dim_v: Number
    pairs: Number | None = None

    @property
    def scores(self) -> Number:
        """Pairs of a query and a key that count."""
        return self.queries * self.keys if self.pairs is None else self.pairs

    @property
    def floor(self) -> Number:
        """Words of reading Q, K, V and writing O once."""
        return (self.queries + self.keys) * (self.dim_k + self.dim_v)

    @property
    def flops(self) -> Number:
        """Operations of the two products."""
        return 2 * self.scores * (self.dim_k + self.dim_v)


def least_words(attention: Attention, memory: Number) -> Number:
    """Words that any program of ordinary multiplication moves with `memory` words of fast memory.

    The proven lower bound of this module, never below the floor.
    """
    memory = np.asarray(memory, float)
    products = np.asarray(attention.scores * (attention.dim_k + attention.dim_v), float)
    best = np.asarray(attention.floor, float)
    for multiple in _SEGMENTS:
        segment = multiple * memory
        whole = (memory + segment) ** 2 / (4 * attention.dim_k)
        crossing = ((2 * memory + segment) / 3) ** 1.5
        moved = segment * (np.ceil(products / (whole + crossing)) - 1)
        best = np.maximum(best, moved)
    return best


def least_bytes(
    attention: Attention, memory_bytes: Number, element_bytes: Number, count: Number = 1
) -> Number:
    """Bytes that `count` attentions must move between main memory and a faster one.

    memory_bytes: capacity of the faster memory, all of it granted to each of them in turn.
    element_bytes: of the smallest element (wider accumulators only make it worse).
    """
    return count * element_bytes * least_words(attention, memory_bytes / element_bytes)


@dataclass(frozen=True, slots=True)
class Program:
    """A way to run attention: its name, tile sizes, resident words at its peak, words moved."""

    name: str
    tiles: Mapping[str, int]
    resident: int
    words: int


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def flash(a: Attention, memory: int, columns: int = 1) -> Program | None:
    """Rows of Q and O stay, K and V stream by (FlashAttention-2), `columns` keys at a time.

    None where not even one row fits.
    """
    n, m, dk, dv = _sizes(a)
    columns = min(columns, m)
    room = memory - SCRATCH - columns * max(dk, dv)
    rows = min(n, room // (dk + dv + 2 + columns))
    if rows < 1:
        return None
    resident = rows * (dk + dv + 2 + columns) + columns * max(dk, dv) + SCRATCH
    words = n * (dk + dv) + _blocks(n, rows) * m * (dk + dv)
    return Program("flash", {"rows": rows, "columns": columns}, resident, words)


def keys_stay(a: Attention, memory: int) -> Program | None:
    """Keys and values stay, queries stream by; outputs return once for every block of keys."""
    n, m, dk, dv = _sizes(a)
    columns = min(m, (memory - SCRATCH - dk - dv - 2) // (dk + dv + 1))
    if columns < 1:
        return None
    resident = columns * (dk + dv + 1) + dk + dv + 2 + SCRATCH
    blocks = _blocks(m, columns)
    words = m * (dk + dv) + blocks * n * (dk + dv) + (blocks - 1) * n * (dv + 4)
    return Program("keys", {"columns": columns}, resident, words)


def tiled(a: Attention, memory: int) -> Program | None:
    """Two tiled products with the scores written in between: matrix multiplication's own cost.

    Square tiles of partial sums stay while single rows and columns stream by; maxima and sums of
    a block of rows are made along the way, so the softmax costs no pass of its own.
    """
    n, m, dk, dv = _sizes(a)
    most = (memory - SCRATCH - 1) // 4
    if most < 1:
        return None
    rows = np.arange(1, min(n, most) + 1)
    beside = (memory - SCRATCH - 3 * rows) // (rows + 1)
    columns, channels = np.minimum(beside, m), np.minimum(beside, dv)
    blocks = -(-n // rows)
    words = (
        -(-m // columns) * n * dk + blocks * m * dk + n * m
        + -(-dv // channels) * n * m + blocks * m * dv + n * dv
    )  # fmt: skip
    i = int(np.argmin(words))
    r, c, e = int(rows[i]), int(columns[i]), int(channels[i])
    resident = 3 * r + max(r * c + c, r * e + e) + SCRATCH
    return Program("tiled", {"rows": r, "columns": c, "channels": e}, resident, int(words[i]))


PROGRAMS: Mapping[str, Callable[[Attention, int], Program | None]] = {
    "flash": flash, "keys": keys_stay, "tiled": tiled,
}  # fmt: skip


def best_program(attention: Attention, memory: int) -> Program:
    """The program and tiles that move least in `memory` words. Raises NarrowsError below 7."""
    found = [p for make in PROGRAMS.values() if (p := make(attention, memory)) is not None]
    if not found:
        raise NarrowsError(
            f"attention needs at least {LEAST_MEMORY} words of fast memory here, not {memory}"
        )
    return min(found, key=lambda p: p.words)


def least_memory(attention: Attention, words: int) -> int:
    """The smallest fast memory with which the best program moves at most `words`.

    Raises NarrowsError for a budget below the floor, which no memory reaches.
    """
    if words < attention.floor:
        raise NarrowsError(
            f"no memory brings attention below {int(attention.floor)} words, the size of its "
            f"inputs and output; {words} were asked for"
        )
    low, high = LEAST_MEMORY, LEAST_MEMORY
    while best_program(attention, high).words > words:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        if best_program(attention, middle).words <= words:
            high = middle
        else:
            low = middle + 1
    return high


def _sizes(a: Attention) -> tuple[int, int, int, int]:
    return int(a.queries), int(a.keys), int(a.dim_k), int(a.dim_v)
