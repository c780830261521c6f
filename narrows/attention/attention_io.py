"""The least that exact attention moves between a slow and a fast memory, and what reaches it.

Narrow point: accesses to slow memory, as a function of the words that fit into the fast one.

Mechanism:
1. A fast memory of M words; arithmetic sees nothing else; every word in or out counts.
2. From M = d^2 on, rows of queries and outputs stay and keys stream by: N^2 d^2 / M words.
3. Below, that is not optimal: tiled products with written scores move N^2 d / sqrt(M).
4. A proven lower bound, for every M, says how far any program is from the end of the road.
5. The programs are run on real numbers in a memory that refuses the word too many.

Paper: Saha and Ye, "The I/O Complexity of Attention, or How Optimal is Flash Attention?", ICML
2024, arXiv:2402.07443 (Theta results; the constants of the lower bound are derived in
core/traffic.py).

When it hurts: it bounds transfers between two levels, not time; a kernel below its bytes' time
is limited by something else. The small-memory bound is for ordinary multiplication only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from narrows.attention._memory import Array, CapacityExceeded, TwoLevelMemory
from narrows.attention._programs import execute
from narrows.core.errors import NarrowsError, unknown
from narrows.core.method import Instrument, Reading
from narrows.core.traffic import PROGRAMS, Attention, Program, best_program, least_words

__all__ = ["Attention", "AttentionIO", "CapacityExceeded", "Executed", "TwoLevelMemory"]


@dataclass(frozen=True)
class Executed:
    """An attention that was run: output (n, dim_v), the program, words counted, peak words."""

    output: Array
    program: Program
    loads: int
    stores: int
    peak: int

    @property
    def words(self) -> int:
        """Words moved either way."""
        return self.loads + self.stores


class AttentionIO(Instrument):
    """Reads the transfers of attention for a fast memory of `words` words.

    words: the default is the 192 KiB of shared memory of an A100's multiprocessor in 16-bit
    words, the fast memory in front of which FlashAttention was published. program: one of
    `flash`, `keys`, `tiled`; the best for the case where it is empty.
    """

    key: ClassVar[str] = "attention_io"
    paper: ClassVar[str] = "arXiv:2402.07443"
    relieves: ClassVar[str] = "memory bandwidth"

    def __init__(self, words: int = 98_304, program: str = "") -> None:
        if program and program not in PROGRAMS:
            raise unknown("program", program, PROGRAMS)
        if words < 1:
            raise NarrowsError(f"a fast memory has at least one word, not {words}")
        self.words = words
        self.program = program

    def measure(self, target: Attention | tuple[Array, Array, Array]) -> Reading:
        """Words moved: planned for a shape, counted in a run for arrays (q, k, v).

        The interval is (lower bound, words of the program); what lies between the two is not
        known to be possible or impossible. `facts` hold the program, its tiles, the floor, the
        ratio to the bound, and flops per word.
        """
        if isinstance(target, Attention):
            attention, program = target, self.plan(target)
            moved = program.words
        else:
            attention = shape_of(*target)
            ran = self.run(*target)
            program, moved = ran.program, ran.words
        lower = float(least_words(attention, self.words))
        facts: dict[str, Any] = {
            "program": program.name, "tiles": dict(program.tiles), "resident": program.resident,
            "floor": float(attention.floor), "ratio": moved / lower,
            "flops_per_word": float(attention.flops) / moved,
        }  # fmt: skip
        return Reading(float(moved), "word", (lower, float(moved)), None, facts)

    def plan(self, attention: Attention) -> Program:
        """The program and tiles for a shape. Raises NarrowsError where the memory is too small."""
        if not self.program:
            return best_program(attention, self.words)
        found = PROGRAMS[self.program](attention, self.words)
        if found is None:
            raise NarrowsError(
                f"program {self.program!r} does not run in {self.words} words with "
                f"{attention.dim_k} channels; leave the program open, or give more"
            )
        return found

    def run(self, q: Array, k: Array, v: Array, program: Program | None = None) -> Executed:
        """softmax(q k^T / sqrt(d)) v through a memory of exactly `words` words.

        q: (n, dim_k). k: (m, dim_k). v: (m, dim_v). program: another than the planned one.
        Raises CapacityExceeded the moment a program holds more than fits.
        """
        attention = shape_of(q, k, v)
        chosen = program or self.plan(attention)
        scaled = np.asarray(q, float) / np.sqrt(q.shape[1])
        memory = execute(chosen, scaled, np.asarray(k, float), np.asarray(v, float), self.words)
        return Executed(memory.result("O"), chosen, memory.loads, memory.stores, memory.peak)


def shape_of(q: Array, k: Array, v: Array) -> Attention:
    """The shape of an attention on arrays; axes must fit each other."""
    if q.ndim != 2 or k.ndim != 2 or v.ndim != 2 or q.shape[1] != k.shape[1] or len(k) != len(v):
        raise NarrowsError(
            "attention takes q (n, d), k (m, d) and v (m, e); given were "
            f"{q.shape}, {k.shape} and {v.shape}"
        )
    return Attention(len(q), len(k), q.shape[1], v.shape[1])
