"""One-pass attention on the array: where each Einsum runs, what it moves, how long it takes.

Everything follows from the cascade: its ranks give the loop nest, its operations the cycles, its
references what passes through the buffer. What is decided here is the mapping (which ranks are
spread over the array, and which Einsums run on the 2D array) and the binding (what overlaps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from narrows.chips._array import DRAM_BYTES, ROW_WORDS, Array, Energy, Part, Shape
from narrows.chips._nest import Nest
from narrows.core.cascade import Cascade, Einsum, Ref
from narrows.core.errors import NarrowsError


@dataclass(frozen=True)
class Layout:
    """How the one-pass cascade lies on the array.

    wide: Einsums on the 2D array, chunk rows by queries; the rest is on the 1D array. exchanged:
    tensors with a value for every key and query that pass between the arrays, through the
    buffer. exp_macs: multiply-adds of an exponential, 0 where a unit of its own does it in one
    step.
    """

    wide: tuple[str, ...]
    exchanged: tuple[str, ...]
    exp_macs: int


FUSEMAX_LAYOUT = Layout(("QK", "LM", "SLN", "SLD", "SLNV"), (), 6)
FLAT_LAYOUT = Layout(("QK", "SLNV"), ("QK", "SLN"), 0)
"""On FLAT's elements, which only multiply and add, all of the softmax is left to the 1D array."""

INPUTS = ("Q", "BK", "BV")


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def query_tiles(array: Array, shape: Shape, tokens: int, layout: Layout) -> int:
    """Tiles of `pe` queries that stay in the buffer together: the most that fit and divide.

    A chunk of keys and of values, and for every query its own row, its two running scalars, its
    numerator, and a row of scores for each exchanged tensor. A buffer too small for one tile is
    an error.
    """
    d = shape.head_dim
    chunk = 2 * array.pe * d * array.word
    query = (2 * d + 2 + array.pe * len(layout.exchanged)) * array.word
    most = (array.buffer - chunk) // (query * array.pe)
    if tokens % array.pe:
        raise NarrowsError(f"{tokens} tokens do not fill tiles of {array.pe}: give a multiple")
    if most < 1:
        raise NarrowsError(
            f"a buffer of {array.buffer} bytes cannot hold one tile of {array.pe} queries with "
            f"{d} channels; it needs {chunk + query * array.pe}"
        )
    return max(f for f in divisors(tokens // array.pe) if f <= most)


def nest_of(
    e: Einsum, array: Array, shape: Shape, tokens: int, batch: int, tiles: int, wide: bool
) -> Nest:
    """The loop nest of one Einsum: chunks of keys inside tiles of queries inside heads."""
    dram: dict[str, int] = {}
    if "m1" in e.ranks:
        dram["m1"] = tokens // array.pe
    dram |= {"p": tokens // array.pe // tiles, "h": shape.heads, "b": batch}
    buffer = {r: shape.head_dim for r in ("e", "f") if r in e.ranks}
    spatial = {"p": array.pe}
    if "m0" in e.ranks:
        (spatial if wide else buffer)["m0"] = array.pe
    return Nest({"dram": dram, "buffer": {**buffer, "p": tiles}}, spatial)


def _keep(e: Einsum, x: Ref, cascade: Cascade, layout: Layout) -> tuple[str, ...]:
    """Levels that hold a reference of an Einsum, outermost first."""
    states = {s.name for s in cascade.einsums if s.start}
    made = x is e.output
    first = next(o for o in cascade.einsums if any(x == r for r in o.reads)) if not made else e
    if x.tensor in INPUTS:
        return ("dram", "buffer", "pe")
    if made and not any(x.tensor == r.tensor for o in cascade.einsums for r in o.reads):
        return ("dram", "pe")
    if x.tensor in states:
        fresh = any(i.shift for i in x.index)
        if made or (not fresh and first is e):
            return ("buffer", "pe")
        return ("row", "pe") if e.name in layout.wide else ("pe",)
    if x.tensor in layout.exchanged:
        return ("buffer", "pe") if made or first is not e else ("pe",)
    if made and e.name in layout.wide and "m0" in e.reduced:
        return ("row", "pe")
    return ("pe",)


def steps(e: Einsum, exp_macs: int) -> int:
    """Cycles a unit spends on one point: one an operation, an exponential on multiply-adds."""
    return sum(
        n * (exp_macs if op == "exp" and exp_macs else 1) for op, n in e.operations().items()
    )


def parts(
    cascade: Cascade, array: Array, shape: Shape, tokens: int, batch: int,
    layout: Layout, energy: Energy,
) -> dict[str, Part]:  # fmt: skip
    """Every Einsum of the cascade on the array, by name."""
    tiles = query_tiles(array, shape, tokens, layout)
    found: dict[str, Part] = {}
    for e in cascade.einsums:
        if e.start or e.view:
            continue
        wide = e.name in layout.wide
        nest = nest_of(e, array, shape, tokens, batch, tiles, wide)
        moved: dict[tuple[str, str], int] = {}
        for x in (*e.reads, e.output):
            ranks = (*x.ranks, "h", "b")
            kept = nest.moves(ranks, _keep(e, x, cascade, layout), x is e.output)
            for level, m in kept.items():
                scale = nest.elements if level == "pe" else 1
                reads, writes = moved.get((level, "r"), 0), moved.get((level, "w"), 0)
                moved[level, "r"] = reads + m.reads * scale
                moved[level, "w"] = writes + (m.fills + m.updates) * scale
        work = {op: n * nest.points for op, n in e.operations().items()}
        if layout.exp_macs and "exp" in work:
            work["mac"] = work.get("mac", 0) + layout.exp_macs * work.pop("exp")
        traffic = (moved.get(("dram", "r"), 0) + moved.get(("dram", "w"), 0)) * array.word
        found[e.name] = Part(
            e.name, wide, nest.cycles * steps(e, layout.exp_macs), traffic,
            joules(energy, traffic, moved, work, wide), 1.0,
        )  # fmt: skip
    return found


def joules(
    energy: Energy, traffic: float, moved: Mapping[tuple[str, str], float],
    work: Mapping[str, float], wide: bool,
) -> dict[str, float]:  # fmt: skip
    """Joules by kind. traffic: bytes of main memory; moved: words by (level, r or w)."""
    pe = energy.pe if wide else energy.row
    levels = {
        "registers": (*pe, "pe"), "row": (*energy.row, "row"),
        "buffer": (energy.read / ROW_WORDS, energy.write / ROW_WORDS, "buffer"),
    }  # fmt: skip
    found = {"dram": traffic / DRAM_BYTES * energy.dram}
    for kind, (read, write, level) in levels.items():
        found[kind] = moved.get((level, "r"), 0) * read + moved.get((level, "w"), 0) * write
    found["compute"] = sum(n * energy.compute[op] for op, n in work.items())
    return {kind: value * 1e-12 for kind, value in found.items()}


def waterfall(
    found: Mapping[str, Part], phases: Sequence[tuple[Sequence[str], Sequence[str]]]
) -> float:
    """Cycles of phases that follow each other, in which the two arrays run side by side."""
    return sum(
        max(sum(found[n].cycles for n in wide), sum(found[n].cycles for n in narrow))
        for wide, narrow in phases
    )


BINDING = (
    (("QK", "LM"), ("RD", "RNV", "AV")),
    ((), ("RM",)),
    (("SLN", "SLD"), ("PRM", "SPD")),
    (("SLNV",), ("SPNV",)),
)
"""FuseMax's schedule: while the 2D array starts on the next chunk, the 1D array finishes the one
before, so neither waits (section V, the waterfall)."""

STALLING = (
    (("QK", "LM"), ("RD", "AV")),
    ((), ("RM",)),
    (("SLN", "SLD"), ("PRM", "SPD")),
    (("SLNV",), ("SPNV", "RNV")),
)
"""Without interleaving: one chunk after the other, and the 2D array waits for the maximum."""
