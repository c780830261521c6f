"""What FuseMax is compared with: FLAT, unfused attention, and the layers that all of them share.

FLAT (Kao et al. 2023) fuses the two products of attention and leaves the softmax, in three
passes over the keys, to the 1D array. Which tensors it keeps on chip, in which order it walks
them and how many queries it fuses at a time is the choice of FLAT's own mapper; the choices for
the paper's networks are inputs of the artifact (`flat_validation.csv`, columns of placement) and
are given in `flat_choice`. What they cost is derived here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from narrows.chips._array import Array, Energy, Part, Shape
from narrows.chips._cascades import THREE_PASS
from narrows.chips._fused import divisors, joules
from narrows.chips._nest import Moves, Nest
from narrows.core.cascade import Einsum, parse
from narrows.core.errors import NarrowsError, unknown

PLAIN = parse(THREE_PASS)
PRODUCTS = ("QK", "AV")


@dataclass(frozen=True)
class Dataflow:
    """A choice of FLAT's mapper.

    onchip: tensors of attention kept in the buffer (A goes where QK goes). rows: queries fused
    at a time, 0 for a whole head. stationary: `output` (partial sums stay in the elements),
    `weight` (keys and values stay) or `input`. spilled: share of the on-chip tensors that does
    not fit and goes to main memory; derived where it is None.
    """

    onchip: frozenset[str]
    rows: int = 0
    stationary: str = "output"
    spilled: float | None = None


def flat_choice(shape: Shape, tokens: int) -> Dataflow:
    """FLAT's choice for the paper's head sizes and lengths, 1K to 1M by powers of four."""
    scores = frozenset({"QK", "A"})
    far = Dataflow(frozenset({"Q", "AV"}), 1024, "weight")
    narrow = {
        1024: Dataflow(scores), 4096: Dataflow(scores), 16384: Dataflow(scores, 1024),
        65536: Dataflow(scores | {"AV"}, 256), 262144: far, 1048576: far,
    }  # fmt: skip
    wide = {
        1024: Dataflow(scores | {"V"}), 4096: Dataflow(scores | {"V"}),
        16384: Dataflow(scores | {"Q"}, 1024), 65536: Dataflow(scores | {"Q", "AV"}, 256),
        262144: far, 1048576: far,
    }  # fmt: skip
    table = {64: narrow, 128: wide}.get(shape.head_dim, {})
    if tokens not in table:
        raise NarrowsError(
            f"FLAT's own choice of dataflow is not published for {shape.head_dim} channels and "
            f"{tokens} tokens; give one: Dataflow(onchip, rows, stationary)"
        )
    return table[tokens]


def spilled(flow: Dataflow, array: Array, shape: Shape, tokens: int) -> float:
    """Share of the on-chip tensors that overflows the buffer.

    Scores are held once; what is kept otherwise, and a tile of what streams, is double-buffered.
    """
    if flow.spilled is not None:
        return flow.spilled
    d, rows = shape.head_dim, flow.rows or tokens
    need = rows * tokens if "QK" in flow.onchip else 0
    for name, length in (("Q", rows), ("AV", rows), ("K", tokens), ("V", tokens)):
        need += 2 * d * (length if name in flow.onchip else array.pe)
    return 1 - min(1.0, array.buffer / (need * array.word))


def flat_nest(
    e: Einsum, flow: Dataflow, array: Array, shape: Shape, tokens: int, batch: int
) -> Nest:
    """One of FLAT's two products: the stationary rank in time, the other two over the array."""
    rows = min(flow.rows or tokens, tokens)
    channel = "e" if "e" in e.ranks else "f"
    extent = {channel: shape.head_dim, "m": tokens, "p": rows}
    if flow.stationary not in ("input", "weight", "output"):
        raise unknown("stationarity", flow.stationary, ("input", "weight", "output"))
    order = {
        "input": ("m", "e", "p") if channel == "e" else ("f", "m", "p"),
        "weight": ("p", channel, "m"),
        "output": ("e", "m", "p") if channel == "e" else ("m", "f", "p"),
    }[flow.stationary]
    buffer = {r: extent[r] if r == order[0] else max(1, extent[r] // array.pe) for r in order}
    spatial = {r: min(array.pe, extent[r]) for r in order[1:]}
    return Nest(
        {"dram": {"p": tokens // rows, "h": shape.heads, "b": batch}, "buffer": buffer}, spatial
    )


def _words(m: Moves) -> tuple[int, int]:
    """Words read and written for the level inside; a first reading of partial sums is none."""
    return (0 if m.reads == m.updates else m.reads), m.updates


def flat_parts(
    flow: Dataflow, array: Array, shape: Shape, tokens: int, batch: int, energy: Energy,
    strict_spill: bool = False,
) -> dict[str, Part]:  # fmt: skip
    """FLAT's Einsums by name. strict_spill: what is spilled is loaded before it is written back,
    as FLAT's own simulator counts it."""
    share = spilled(flow, array, shape, tokens)
    found: dict[str, Part] = {}
    occupied = 0
    for name in PRODUCTS:
        e = PLAIN[name]
        nest = flat_nest(e, flow, array, shape, tokens, batch)
        traffic = 0.0
        moved: dict[tuple[str, str], float] = {}
        for x in (*e.reads, e.output):
            inside = x.tensor in flow.onchip
            outside = x.tensor not in flow.onchip or x.tensor not in ("QK", "A")
            keep = (*(("dram",) if outside else ()), *(("buffer",) if inside else ()), "pe")
            moves = nest.moves((*x.ranks, "h", "b"), keep, x is e.output)
            if inside:
                traffic += share * sum(_words(moves["buffer"]))
                held = [r for r in x.ranks if r in ("m", "p", "e", "f")]
                size = 1
                for r in held:
                    size *= nest.temporal["buffer"].get(r, 1) * nest.spatial.get(r, 1)
                occupied += size
            if outside:
                part = 1.0 if not inside or strict_spill else 1 - share
                traffic += part * sum(_words(moves["dram"]))
            for level, m in moves.items():
                scale = nest.elements if level == "pe" else 1
                moved[level, "r"] = moved.get((level, "r"), 0) + m.reads * scale
                moved[level, "w"] = moved.get((level, "w"), 0) + (m.fills + m.updates) * scale
        work = {op: n * nest.points for op, n in e.operations().items()}
        found[name] = Part(
            name, True, nest.cycles, traffic * array.word,
            joules(energy, traffic * array.word, moved, work, True),
            nest.elements / array.pe**2,
        )  # fmt: skip
    onchip = "QK" in flow.onchip
    row = share
    if not onchip:
        row = 1 - min(1.0, (array.buffer / array.word - occupied) / tokens)
    return found | softmax_parts(array, shape, tokens, batch, energy, onchip, row)


def softmax_parts(
    array: Array, shape: Shape, tokens: int, batch: int, energy: Energy, onchip: bool, row: float
) -> dict[str, Part]:
    """The four Einsums of the softmax on the 1D array, a query at a time.

    onchip: whether scores come from, and go to, the buffer. row: share of a row of scores that
    does not fit there. An exponential or a division takes its turn in a pipeline: one cycle.
    """
    nest = Nest(
        {
            "dram": {"p": tokens, "h": shape.heads, "b": batch},
            "buffer": {"m": max(1, tokens // array.pe)},
        },
        {"m": array.pe},
    )
    passing = {"M": ("QK",), "SN": ("QK", "SN"), "SD": (), "A": ("SN", "A")}
    found: dict[str, Part] = {}
    for name, big in passing.items():
        e = PLAIN[name]
        traffic = 0.0
        moved: dict[tuple[str, str], float] = {}
        for x in (*e.reads, e.output):
            outside = not onchip and (name, x.tensor) in (("M", "QK"), ("A", "A"))
            inside = not (x.tensor == "A" and not onchip) and (name, x.tensor) != ("SD", "SN")
            keep = (*(("dram",) if outside else ()), *(("buffer",) if inside else ()), "pe")
            moves = nest.moves((*x.ranks, "h", "b"), keep, x is e.output)
            if x.tensor in big:
                if inside:
                    traffic += row * sum(_words(moves["buffer"]))
                if outside:
                    traffic += (1 - row if inside else 1.0) * sum(_words(moves["dram"]))
            for level, m in moves.items():
                scale = nest.elements if level == "pe" else 1
                moved[level, "r"] = moved.get((level, "r"), 0) + m.reads * scale
                moved[level, "w"] = moved.get((level, "w"), 0) + (m.fills + m.updates) * scale
        work = {op: n * nest.points for op, n in e.operations().items()}
        found[name] = Part(
            name, False, nest.cycles, traffic * array.word,
            joules(energy, traffic * array.word, moved, work, False),
        )  # fmt: skip
    return found


def product(
    name: str, rows: int, inner: int, columns: int, count: int, array: Array, energy: Energy,
    written: bool = True,
) -> Part:  # fmt: skip
    """A product (rows, inner) by (inner, columns) on the 2D array, `count` times over.

    The inner rank stays whole on chip; of the tiles that divide rows and columns and fit, those
    that move least are taken: rows once, columns once for every tile of rows unless all of them
    stay. The result goes straight to main memory.
    """
    tile = min(array.pe, rows), min(array.pe, columns)
    room = array.buffer // array.word // inner
    sizes = [
        (m, n)
        for m in divisors(rows) if m % tile[0] == 0
        for n in divisors(columns) if n % tile[1] == 0 and m + n <= room
    ]  # fmt: skip
    if not sizes:
        raise NarrowsError(
            f"a buffer of {array.buffer} bytes cannot hold two tiles of {array.pe} by {inner}"
        )
    m, n = min(sizes, key=lambda s: (1 if s[1] == columns else rows // s[0], -s[0], -s[1]))
    again = 1 if n == columns else rows // m
    traffic = (inner * rows + inner * columns * again + rows * columns * written) * count
    nest = Nest(
        {"dram": {"n": columns // n, "m": rows // m, "b": count},
         "buffer": {"k": inner, "n": n // tile[1], "m": m // tile[0]}},
        {"m": tile[0], "n": tile[1]},
    )  # fmt: skip
    moved: dict[tuple[str, str], float] = {}
    for ranks, keep, made in (
        (("k", "m", "b"), ("dram", "buffer", "pe"), False),
        (("k", "n", "b"), ("dram", "buffer", "pe"), False),
        (("m", "n", "b"), ("dram", "pe"), True),
    ):
        for level, v in nest.moves(ranks, keep, made).items():
            scale = nest.elements if level == "pe" else 1
            moved[level, "r"] = moved.get((level, "r"), 0) + v.reads * scale
            moved[level, "w"] = moved.get((level, "w"), 0) + (v.fills + v.updates) * scale
    b = traffic * array.word
    work: Mapping[str, float] = {"mac": nest.points}
    return Part(name, True, nest.cycles, b, joules(energy, b, moved, work, True),
                nest.elements / array.pe**2)  # fmt: skip


def unfused_parts(
    array: Array, shape: Shape, tokens: int, batch: int, energy: Energy
) -> dict[str, Part]:
    """Products and softmax one after the other, with scores in main memory in between."""
    d, count = shape.head_dim, batch * shape.heads
    qk = product("QK", tokens, d, tokens, count, array, energy)
    # The second product walks the same loops with scores read instead of written.
    av = product("AV", tokens, d, tokens, count, array, energy)
    row = 1 - min(1.0, array.buffer / array.word / tokens)
    return {"QK": qk, "AV": av} | softmax_parts(array, shape, tokens, batch, energy, False, row)


def linear_parts(
    array: Array, shape: Shape, tokens: int, batch: int, energy: Energy
) -> dict[str, Part]:
    """The products around attention: queries, keys, values, output, and the two of the hidden
    layer."""
    inside, rows = shape.heads * shape.head_dim, batch * tokens
    sizes = {
        "Q": (shape.width, inside), "K": (shape.width, inside), "V": (shape.width, inside),
        "Z": (inside, shape.width), "FFN1": (shape.width, shape.hidden),
        "FFN2": (shape.hidden, shape.width),
    }  # fmt: skip
    return {name: product(name, rows, k, n, 1, array, energy) for name, (k, n) in sizes.items()}
