"""The three programs of core/traffic.py, run on numbers through an enforced memory.

Softmax is online: a running maximum m and sum l for every row, rescaled when m grows (Milakov and
Gimelshein 2018; Dao 2023, "FlashAttention-2", algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np

from narrows.attention._memory import Array, TwoLevelMemory
from narrows.core.traffic import SCRATCH, Program


def cuts(length: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size`."""
    edges = [*range(0, length, size), length]
    return [slice(a, b) for a, b in pairwise(edges)]


def absorb(scores: Array, state: Array, out: Array | None, scratch: Array) -> None:
    """Turn rows of scores into weights relative to the running maximum; rescale what went before.

    scores: (rows, columns), in place. state: (rows, 2), maximum and sum. out: (rows, channels).
    """
    for i in range(len(scores)):
        scratch[0] = max(state[i, 0], scores[i].max())
        scratch[1] = np.exp(state[i, 0] - scratch[0])
        np.subtract(scores[i], scratch[0], out=scores[i])
        np.exp(scores[i], out=scores[i])
        state[i, 1] = state[i, 1] * scratch[1] + scores[i].sum()
        state[i, 0] = scratch[0]
        if out is not None:
            np.multiply(out[i], scratch[1], out=out[i])


def run_flash(memory: TwoLevelMemory, tiles: Mapping[str, int], sizes: tuple[int, ...]) -> None:
    """Rows of Q and O stay; K and V stream by."""
    n, m, _, dv = sizes
    with memory.space(SCRATCH) as scratch:
        for rows in cuts(n, tiles["rows"]):
            count = rows.stop - rows.start
            with (
                memory.load("Q", rows) as q,
                memory.space(count, dv) as out,
                memory.space(count, 2) as state,
            ):
                state[:, 0] = -np.inf
                for columns in cuts(m, tiles["columns"]):
                    with memory.space(count, columns.stop - columns.start) as scores:
                        with memory.load("K", columns) as k:
                            np.matmul(q, k.T, out=scores)
                        absorb(scores, state, out, scratch)
                        with memory.load("V", columns) as v:
                            out += scores @ v
                out /= state[:, 1:]
                memory.store("O", out, rows)


def run_keys(memory: TwoLevelMemory, tiles: Mapping[str, int], sizes: tuple[int, ...]) -> None:
    """Keys and values stay; queries stream by, outputs and their state return for every block."""
    n, m, _, dv = sizes
    blocks = cuts(m, tiles["columns"])
    with memory.space(SCRATCH) as scratch:
        for b, columns in enumerate(blocks):
            with memory.load("K", columns) as k, memory.load("V", columns) as v:
                for i in range(n):
                    row = slice(i, i + 1)
                    with (
                        memory.load("Q", row) as q,
                        memory.load("O", row) if b else memory.space(1, dv) as out,
                        memory.load("state", row) if b else memory.space(1, 2) as state,
                        memory.space(1, len(k)) as scores,
                    ):
                        if not b:
                            state[:, 0] = -np.inf
                        np.matmul(q, k.T, out=scores)
                        absorb(scores, state, out, scratch)
                        out[0] += scores[0] @ v
                        if b + 1 == len(blocks):
                            out[0] /= state[0, 1]
                        else:
                            memory.store("state", state, row)
                        memory.store("O", out, row)


def run_tiled(memory: TwoLevelMemory, tiles: Mapping[str, int], sizes: tuple[int, ...]) -> None:
    """Two products by square tiles of partial sums; scores go to slow memory in between."""
    n, m, dk, dv = sizes
    with memory.space(SCRATCH) as scratch:
        for rows in cuts(n, tiles["rows"]):
            count = rows.stop - rows.start
            with memory.space(count, 2) as state:
                state[:, 0] = -np.inf
                for columns in cuts(m, tiles["columns"]):
                    with memory.space(count, columns.stop - columns.start) as scores:
                        for e in range(dk):
                            with memory.load("Q", rows, e) as q, memory.load("K", columns, e) as k:
                                scores += q[:, None] * k
                        memory.store("S", scores, rows, columns)
                        absorb(scores, state, None, scratch)
                for channels in cuts(dv, tiles["channels"]):
                    with memory.space(count, channels.stop - channels.start) as out:
                        for j in range(m):
                            with memory.load("S", rows, j) as p, memory.load("V", j, channels) as v:
                                np.subtract(p, state[:, 0], out=p)
                                np.exp(p, out=p)
                                out += p[:, None] * v
                        out /= state[:, 1:]
                        memory.store("O", out, rows, channels)


RUNS: Mapping[str, Callable[[TwoLevelMemory, Mapping[str, int], tuple[int, ...]], None]] = {
    "flash": run_flash, "keys": run_keys, "tiled": run_tiled,
}  # fmt: skip


def execute(program: Program, q: Array, k: Array, v: Array, capacity: int) -> TwoLevelMemory:
    """Run a program on real arrays; its output is `.result("O")`, its cost `.words`.

    q: (n, dim_k), scaled already. k: (m, dim_k). v: (m, dim_v). Raises CapacityExceeded where
    the program needs more than `capacity` words.
    """
    n, m, dk, dv = len(q), len(k), q.shape[1], v.shape[1]
    slow: dict[str, Array] = {"Q": q, "K": k, "V": v, "O": np.zeros((n, dv))}
    if program.name == "tiled":
        slow["S"] = np.zeros((n, m))
    if program.name == "keys":
        slow["state"] = np.zeros((n, 2))
    memory = TwoLevelMemory(capacity, slow)
    RUNS[program.name](memory, program.tiles, (n, m, dk, dv))
    return memory
