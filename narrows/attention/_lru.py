"""An ordinary cache beside the explicit memory: least recently used words leave.

The trace holds every word a program's loops touch, written down apart from the executor; the
cache knows nothing of tiles. Sleator and Tarjan (1985): with twice the words it misses at most
about twice as often as the best policy, so also as the explicit transfers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from narrows.attention._programs import cuts
from narrows.core.traffic import Attention, Program

Touch = tuple[str, int, int, bool]
"""Array, row, column, and whether it is written without being read."""


def touches(program: Program, a: Attention) -> Iterator[Touch]:
    """Every word the loops of `flash` or `tiled` touch, in order."""
    n, m, dk, dv = int(a.queries), int(a.keys), int(a.dim_k), int(a.dim_v)
    if program.name == "flash":
        for rows in cuts(n, program.tiles["rows"]):
            for columns in cuts(m, program.tiles["columns"]):
                here = range(rows.start, rows.stop)
                keys = range(columns.start, columns.stop)
                for j in keys:
                    for i in here:
                        for e in range(dk):
                            yield "Q", i, e, False
                            yield "K", j, e, False
                        yield "s", i - rows.start, j - columns.start, True
                for i in here:
                    yield "state", i - rows.start, 0, columns.start == 0
                    yield "state", i - rows.start, 1, columns.start == 0
                for j in keys:
                    for i in here:
                        yield "s", i - rows.start, j - columns.start, False
                        for f in range(dv):
                            yield "V", j, f, False
                            yield "O", i, f, j == 0
        return
    for rows in cuts(n, program.tiles["rows"]):
        here = range(rows.start, rows.stop)
        for columns in cuts(m, program.tiles["columns"]):
            for e in range(dk):
                for i in here:
                    for j in range(columns.start, columns.stop):
                        yield "Q", i, e, False
                        yield "K", j, e, False
                        yield "S", i, j, e == 0
        for channels in cuts(dv, program.tiles["channels"]):
            for j in range(m):
                for i in here:
                    for f in range(channels.start, channels.stop):
                        yield "S", i, j, False
                        yield "V", j, f, False
                        yield "O", i, f, j == 0


def lru_words(trace: Iterable[Touch], capacity: int) -> int:
    """Words a cache of `capacity` moves: misses, evicted words that were written, final results.

    Scratch arrays (lower-case) are dropped at the end, O is written back.
    """
    held: OrderedDict[tuple[str, int, int], bool] = OrderedDict()
    moved = 0
    for name, i, j, fresh in trace:
        word = (name, i, j)
        dirty = held.pop(word, None)
        if dirty is None:
            moved += not fresh
            if len(held) >= capacity:
                moved += held.popitem(last=False)[1]
        held[word] = bool(dirty) or fresh or name in ("O", "S", "state")
    return moved + sum(dirty for (name, _, _), dirty in held.items() if name == "O")
