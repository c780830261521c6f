"""Claims of the I/O complexity of attention.

Paper: Saha and Ye, "The I/O Complexity of Attention, or How Optimal is Flash Attention?", ICML
2024 (arXiv:2402.07443). Its results are orders of growth, Theta(N^2 d^2 / M) from M = d^2 on and
Theta(N^2 d / sqrt(M)) below, so what is checked is their shape: slopes, the crossover, and ratios
that stay bounded; by closed forms that runs in an enforced memory confirm to the word. The lower
bound with constants is our own derivation (core/traffic.py). The paper's part about fast matrix
multiplication is a proof and cannot be measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np

from narrows.attention import _programs
from narrows.attention._lru import lru_words, touches
from narrows.attention._memory import Array, CapacityExceeded
from narrows.attention.attention_io import AttentionIO
from narrows.core.claim import Figure, claim
from narrows.core.traffic import (
    PROGRAMS,
    SCRATCH,
    Attention,
    best_program,
    flash,
    least_words,
    tiled,
)

PAPER_DEFAULTS = {"words": 98_304, "program": ""}
"""The paper leaves M free; 192 KiB in 16-bit words is FlashAttention's own setting (A100)."""

PAPER = "Saha and Ye 2024, abstract"
SHAPES = ((20, 20, 4, 4), (13, 21, 5, 3), (24, 8, 3, 6))
"""Queries, keys, channels of keys, of values: small, and with tiles that do not divide them."""
MEMORIES = (7, 9, 16, 25, 40, 64, 130, 700)


def _arrays(shape: tuple[int, int, int, int]) -> tuple[Array, Array, Array]:
    n, m, dk, dv = shape
    rng = np.random.default_rng(n + m)
    return 4 * rng.normal(size=(n, dk)), rng.normal(size=(m, dk)), rng.normal(size=(m, dv))


def _softmax_attention(q: Array, k: Array, v: Array) -> Array:
    scores = q @ k.T / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def _cases() -> Iterator[tuple[AttentionIO, tuple[int, int, int, int]]]:
    """Every program in every memory that can run it."""
    for shape, memory, name in product(SHAPES, MEMORIES, PROGRAMS):
        if PROGRAMS[name](Attention(*shape), memory) is not None:
            yield AttentionIO(memory, name), shape


@claim(
    expected=(0.0, 1e-6), unit="largest absolute error",
    setting="three programs, three shapes, eight memories of 7 to 700 words, float64",
    source="definition of attention", how="exact", cost=2.0,
    control="without rescaling by the new maximum the sums are wrong",
)  # fmt: skip
def programs_are_exact() -> Figure:
    """Error of executed programs against softmax attention."""
    worst, runs = 0.0, 0
    for instrument, shape in _cases():
        arrays = _arrays(shape)
        found = instrument.run(*arrays).output
        worst = max(worst, float(np.abs(found - _softmax_attention(*arrays)).max()))
        runs += 1
    return Figure(worst, details={"runs": runs})


@claim(
    expected=0.0, unit="words of difference",
    setting="words counted and words resident at the peak, against the closed forms",
    source="card attention_io, works when (a)", how="exact", cost=2.0,
)  # fmt: skip
def counts_equal_closed_forms() -> Figure:
    """Sum of differences over all programs, shapes and memories."""
    off, runs = 0, 0
    for instrument, shape in _cases():
        ran = instrument.run(*_arrays(shape))
        off += abs(ran.words - ran.program.words) + abs(ran.peak - ran.program.resident)
        runs += 1
    return Figure(float(off), details={"runs": runs})


@claim(
    expected=0.0, unit="violations",
    setting="the best program run at every M from 7 to 90 words; 12 queries and keys, 3 channels",
    source="issue: I/O between the lower and the upper bound for every M", how="exact", cost=3.0,
)  # fmt: skip
def every_memory_lies_between_the_bounds() -> Figure:
    """Memories where counted words fall below the lower bound, above the plan, or M is passed."""
    shape, broken, widest = (12, 12, 3, 3), 0, 0.0
    for memory in range(7, 91):
        reading = AttentionIO(memory).measure(_arrays(shape))
        ran = AttentionIO(memory).run(*_arrays(shape))
        low, _ = reading.interval
        broken += not (low <= ran.words <= best_program(Attention(*shape), memory).words)
        broken += ran.peak > memory
        widest = max(widest, ran.words / low)
    return Figure(float(broken), details={"largest ratio to the lower bound": widest})


@claim(
    expected=1.0, unit="fraction refused",
    setting="programs planned for one word more than the memory that they run in",
    source="issue: enforced capacity", how="exact", cost=1.0,
)  # fmt: skip
def capacity_is_enforced() -> float:
    """Share of programs that raise because they hold a word too many."""
    refused, tried = 0, 0
    for instrument, shape in _cases():
        program = instrument.plan(Attention(*shape))
        tried += 1
        try:
            AttentionIO(program.resident - 1).run(*_arrays(shape), program)
        except CapacityExceeded:
            refused += 1
    return refused / tried


def _sweep(n: int, d: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    memories = np.unique(np.geomspace(low, high, 25).astype(int))
    a = Attention(n, n, d, d)
    return memories, np.array([best_program(a, int(m)).words for m in memories], float)


def _slope(memories: np.ndarray, words: np.ndarray) -> float:
    return float(np.polyfit(np.log(memories), np.log(words), 1)[0])


@claim(
    expected=(-1.1, -0.9), unit="log-log slope",
    setting="words against M, best program, N 65536, d 64, M from 2 to 64 d^2",
    source=f"{PAPER}: N^2 d^2 / M from M = d^2 on", how="exact", cost=1.0,
)  # fmt: skip
def slope_of_large_memories() -> float:
    """Slope of the best program's words."""
    return _slope(*_sweep(65536, 64, 2 * 64**2, 64 * 64**2))


@claim(
    expected=(-0.6, -0.4), unit="log-log slope",
    setting="words against M, best program, N 65536, d 128, M from 64 to d^2 / 4",
    source=f"{PAPER}: a better algorithm below d^2; N^2 d / sqrt(M)", how="exact", cost=1.0,
)  # fmt: skip
def slope_of_small_memories() -> float:
    """Slope of the best program's words."""
    return _slope(*_sweep(65536, 128, 64, 128**2 / 4))


@claim(
    expected=(0.0, 6.5), unit="times N^2 d^2 / M",
    setting="best program, N 65536, d 64, M from d^2 to 16 d^2",
    source=f"{PAPER}; card attention_io, works when (b)", how="exact", cost=1.0,
)  # fmt: skip
def constant_of_large_memories() -> float:
    """Largest constant in front of the paper's order."""
    memories, words = _sweep(65536, 64, 64**2, 16 * 64**2)
    return float((words * memories / (65536.0 * 64) ** 2).max())


@claim(
    expected=(0.0, 12.0), unit="times N^2 d / sqrt(M)",
    setting="best program, N 65536, d 64, M from 7 to d^2",
    source=f"{PAPER}; card attention_io, works when (b)", how="exact", cost=1.0,
)  # fmt: skip
def constant_of_small_memories() -> float:
    """Largest constant in front of the paper's order."""
    memories, words = _sweep(65536, 64, 7, 64**2)
    return float((words * np.sqrt(memories) / (65536.0**2 * 64)).max())


@claim(
    expected=(0.25, 4.0), unit="times d^2",
    setting="smallest M from which keeping rows beats tiled products; N 16384; d 32, 64, 128",
    source=f"{PAPER}: the two regimes meet at M = d^2", how="exact", cost=1.0,
)  # fmt: skip
def crossover() -> Figure:
    """Geometric mean of crossover over d^2; each d in the details."""
    found: dict[str, float | str] = {}
    for d in (32, 64, 128):
        a = Attention(16384, 16384, d, d)
        for memory in np.unique(np.geomspace(d * d / 16, 16 * d * d, 200).astype(int)):
            rows, tiles = flash(a, int(memory)), tiled(a, int(memory))
            if rows and tiles and rows.words <= tiles.words:
                found[f"d {d}"] = float(memory) / d**2
                break
    return Figure(float(np.exp(np.mean(np.log([float(x) for x in found.values()])))), details=found)


@claim(
    expected=(1.0, 6.5), unit="times the lower bound",
    setting="best program, d 64 and 128, N 1K to 1M, M from 7 to 16 d^2",
    source=f"{PAPER}: optimal up to constants for every M", how="exact", cost=3.0,
)  # fmt: skip
def distance_to_the_lower_bound() -> Figure:
    """Largest ratio of the best program to the proven lower bound; least in the details."""
    ratios: list[float] = []
    for d, n in product((64, 128), (2**10, 2**14, 2**20)):
        memories, words = _sweep(n, d, 7, 16 * d * d)
        ratios += (words / least_words(Attention(n, n, d, d), memories)).tolist()
    return Figure(max(ratios), details={"least": min(ratios)})


@claim(
    expected=(2.0, float("inf")), unit="times",
    setting="FlashAttention's words over the tiled program's, both counted; N 48, d 16, M d^2 / 4",
    source=f"{PAPER}: FlashAttention is not optimal below d^2", how="exact", cost=2.0,
)  # fmt: skip
def small_memory_gain() -> float:
    """Ratio of counted words of two runs."""
    arrays = _arrays((48, 48, 16, 16))
    rows, tiles = (AttentionIO(64, name).run(*arrays).words for name in ("flash", "tiled"))
    return rows / tiles


@claim(
    expected=0.0, unit="tilings",
    setting="every tile size of every program, 10 queries and keys, 3 channels, M from 7 to 60",
    source="card attention_io, peer: exhaustive tile search", how="exact", cost=2.0,
)  # fmt: skip
def no_tiling_beats_the_planner() -> float:
    """Tilings that fit and move less than the planner's choice."""
    n, d = 10, 3
    a = Attention(n, n, d, d)
    better = 0
    for memory in range(7, 61):
        best = best_program(a, memory).words
        for rows, columns, channels in product(range(1, n + 1), range(1, n + 1), range(1, d + 1)):
            row_blocks, column_blocks = -(-n // rows), -(-n // columns)
            held = {
                "flash": rows * (2 * d + 2 + columns) + columns * d,
                "keys": columns * (2 * d + 1) + 2 * d + 2,
                "tiled": 3 * rows + max(rows * columns + columns, rows * channels + channels),
            }
            words = {
                "flash": 2 * n * d + row_blocks * 2 * n * d,
                "keys": 2 * n * d + column_blocks * 2 * n * d + (column_blocks - 1) * n * (d + 4),
                "tiled": (column_blocks + 2 * row_blocks) * n * d
                + (1 + -(-d // channels)) * n * n + n * d,
            }  # fmt: skip
            better += sum(held[p] + SCRATCH <= memory and words[p] < best for p in held)
    return float(better)


@claim(
    expected=(0.0, 2.0), unit="times",
    setting="words a cache of 2M moves on the program's trace, over the counted words; 20 rows",
    source="card attention_io, works when (b); Sleator and Tarjan 1985", how="exact", cost=4.0,
)  # fmt: skip
def an_ordinary_cache_stays_within_twice() -> float:
    """Largest ratio, least recently used cache against explicit transfers."""
    a = Attention(20, 20, 5, 5)
    worst = 0.0
    for memory, make in product((30, 50, 90, 160), (flash, tiled)):
        program = make(a, memory)
        if program is not None:
            worst = max(worst, lru_words(touches(program, a), 2 * memory) / program.words)
    return worst


@claim(
    expected=0.0, unit="violations",
    setting="best program and lower bound over M from 7 to 10^6, N 2048, d 64",
    source="card attention_io, works when (c)", how="exact", cost=1.0,
)  # fmt: skip
def monotone_and_above_the_floor() -> float:
    """Memories where more words move than in a smaller one, or fewer than the floor."""
    memories, words = _sweep(2048, 64, 7, 10**6)
    a = Attention(2048, 2048, 64, 64)
    low = np.asarray(least_words(a, memories))
    rising = int((np.diff(words) > 0).sum()) + int((np.diff(low) > 1e-6 * low[1:]).sum())
    return float(rising + int((words < low).sum()) + int((low < a.floor).sum()))


@contextmanager
def mutant() -> Iterator[str]:
    """Forgets to rescale what was summed before a new maximum."""
    whole = _programs.absorb

    def forgetful(scores: Array, state: Array, out: Array | None, scratch: Array) -> None:
        whole(scores, state, None, scratch)

    _programs.absorb = forgetful
    try:
        yield programs_are_exact.name
    finally:
        _programs.absorb = whole
