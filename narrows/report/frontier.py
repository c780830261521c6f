"""The frontier of a search: what each cache holds, how fast it decodes, and whether it is within.

x: bytes of the cache when all is generated. y: tokens a second of all requests, as predicted; so
what is better lies to the upper left. Shape: a technique alone, or a stack. Filling: shown to be
within the limits of quality, not decided, or crossed out; it can be told in grey as well. The line
joins what is within and is beaten in both by nothing else that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log10
from typing import Any

from narrows.report import units, words
from narrows.report.labels import Box, Labels, width
from narrows.report.model import Candidate, Frontier
from narrows.report.picture import INK, MUTED, PAPER, PHASES, blank, drawn, named

WITHIN, OUTSIDE, OPEN = PHASES[2], PHASES[1], PHASES[0]
SINGLE, STACK, DENSE = "o", "s", "D"
MARK = 9.0
"""Points across a mark."""


def best(found: Frontier) -> list[Candidate]:
    """What is shown to be within and beaten in bytes and speed by nothing else; fewest bytes first.

    The dense cache is always within.
    """
    known = [c for c in found.candidates if c.verdict == "dense" or words.shown_within(c)]

    def beats(a: Candidate, b: Candidate) -> bool:
        least = a.bytes <= b.bytes and a.speed >= b.speed
        return least and (a.bytes, a.speed) != (b.bytes, b.speed)

    return sorted((c for c in known if not any(beats(o, c) for o in known)), key=lambda c: c.bytes)


class Drawing:
    """One picture while it is drawn."""

    def __init__(self, found: Frontier) -> None:
        self.found = found
        self.figure, self.axes = blank()
        held = [log10(c.bytes) for c in found.candidates]
        speeds = [c.speed for c in found.candidates]
        top = max(*speeds, found.most or 0.0)
        wide = max(max(held) - min(held), 0.2)
        high = max(top - min(speeds), 0.02 * top)
        self.left, self.right = 10 ** (min(held) - 0.08 * wide), 10 ** (max(held) + 0.08 * wide)
        self.axes.set_xscale("log")
        self.axes.set(xlim=(self.left, self.right),
                      ylim=(min(speeds) - 0.1 * high, top + 0.1 * high))  # fmt: skip
        _ticks(self.axes, self.left, self.right)
        named(self.axes, "bytes of the cache when all is generated", "tokens a second, predicted")
        self.labels = Labels(self.axes, INK, MUTED)

    def draw(self) -> Any:
        """Everything, from the back to the front; what comes first takes its place first."""
        self._ceiling()
        line = best(self.found)
        xs, ys = [c.bytes for c in line], [c.speed for c in line]
        self.axes.plot(xs, ys, color=INK, linewidth=1.4, zorder=2)
        for a, b in pairwise(line):
            self.labels.line((a.bytes, b.bytes), (a.speed, b.speed))
        for i, candidate in enumerate(self.found.candidates):
            self._mark(i, candidate)
        self._legend()
        self._names()
        return self.figure

    def _ceiling(self) -> None:
        """What no cache can pass: decode with next to nothing in it."""
        most = self.found.most
        if most is None:
            return
        self.axes.axhline(most, color=INK, linewidth=1.0, dashes=(4, 3), zorder=1.5)
        self.labels.line((self.left, self.right), (most, most))
        x, y = self.labels.pixel(self.left, most)
        told = "with an empty cache"
        self.labels.text(x + 8, y + 5, told, color=MUTED)
        self.labels.take(x + 4, y - 2, x + 12 + width(told), y + 16)

    def _mark(self, i: int, c: Candidate) -> None:
        shape = DENSE if c.verdict == "dense" else STACK if c.stacked else SINGLE
        _shape(self.axes, c.bytes, c.speed, shape, c.verdict if _told(c) else "open", f"cache-{i}")
        self.labels.disc(c.bytes, c.speed, MARK / 2)

    def _names(self) -> None:
        """The dense cache, and the best of each kind, with a line to its mark."""
        f = self.found
        for name, what in ((f.stack, "best stack"), (f.single, "best single one"), ("dense", "")):
            if not name:
                continue
            c = f.of(name)
            told = f"{units.count_bytes(c.bytes)}, {units.number(c.speed)} tokens/s"
            told = f"{what}, {told}" if what else told
            self.labels.callout([name, told], c.bytes, c.speed, MARK / 2)

    def _legend(self) -> None:
        rows: list[list[tuple[str, str, str]]] = [
            [(SINGLE, "", "alone"), (STACK, "", "stack"), (DENSE, "", "dense")],
            [(SINGLE, "within", "within"), (SINGLE, "open", "not decided"),
             (SINGLE, "outside", "outside")],
        ]  # fmt: skip
        wide = max(sum(width(text) + 30 for *_, text in row) for row in rows)
        # lower left: what is small and slow is rare, for fewer bytes are faster
        f = self.labels.frame
        box = Box(f.left + 4, f.bottom + 4, f.left + 4 + wide, f.bottom + 17.0 * len(rows) + 12)
        self.labels.take(box.left, box.bottom, box.right, box.top)
        for i, row in enumerate(rows):
            x, y = box.left + 10, box.top - 14 - 17 * i
            for shape, verdict, text in row:
                dx, dy = self.labels.data(x, y)
                _shape(self.axes, dx, dy, shape, verdict, "")
                self.labels.text(x + 10, y - 3.5, text, color=MUTED)
                x += width(text) + 30


def _told(c: Candidate) -> bool:
    """Whether a verdict is final: outside, or within by the further reading."""
    return c.verdict in ("dense", "outside") or words.shown_within(c)


def _shape(axes: Any, x: float, y: float, shape: str, verdict: str, gid: str) -> None:
    """A mark: filled, hollow, or hollow and crossed."""
    colour = {"within": WITHIN, "outside": OUTSIDE, "open": OPEN}.get(verdict, INK)
    filled = verdict in ("within", "dense")
    style = {"linestyle": "none", "clip_on": False, "zorder": 5 if filled else 4}
    axes.plot(
        [x], [y], marker=shape, markersize=MARK, markerfacecolor=colour if filled else "none",
        markeredgecolor=PAPER if filled else colour, markeredgewidth=0.8 if filled else 1.5,
        gid=gid or None, **style,
    )  # fmt: skip
    if verdict == "outside":
        axes.plot([x], [y], marker="x", markersize=MARK * 0.6, markeredgecolor=colour,
                  markeredgewidth=1.2, **style)  # fmt: skip


def _ticks(axes: Any, low: float, high: float) -> None:
    """Bytes at 1, 2 and 5 of each decade; speeds in short."""
    from matplotlib.ticker import FuncFormatter

    values = [m * 10.0**d for d in range(18) for m in (1, 2, 5)]
    shown = [v for v in values if low <= v <= high]
    axes.xaxis.set_ticks(shown, [f"{_short(v)}B" for v in shown])
    axes.xaxis.set_ticks([], minor=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y).strip()))


def _short(value: float) -> str:
    number, _, prefix = units.si(value, "").partition(" ")
    return f"{float(number):g} {prefix}"


def describe(found: Frontier) -> str:
    """The picture in a sentence or two, for those who do not see it."""
    tried = len(found.candidates) - 1
    inside = sum(words.shown_within(c) for c in found.candidates)
    return (
        f"Bytes of the cache and predicted tokens a second of the dense cache and {tried} others, "
        f"{inside} of them shown to be within the limits. {' '.join(found.told)}"
    )


def hints(candidates: Sequence[Candidate]) -> dict[str, str]:
    """What a pointer over a mark reads, by the id of the mark."""
    told: dict[str, str] = {}
    for i, c in enumerate(candidates):
        costs = "".join(f", {m} {words.cost(v)}" for m, v in c.costs.items())
        verdict = f": {words.verdict(c)}" if c.verdict != "dense" else ""
        told[f"cache-{i}"] = (
            f"{c.name}{verdict}, {units.count_bytes(c.bytes)}, {units.seconds(c.seconds)} a step, "
            f"{units.number(c.speed)} tokens/s{costs}"
        )
    return told


def svg(found: Frontier, *, standalone: bool = False) -> str:
    """The picture as SVG text. standalone: with its own colours, for light and for dark pages."""
    return drawn(
        lambda: Drawing(found).draw(), "frontier", describe(found), hints(found.candidates),
        ("cache-",), standalone,
    )  # fmt: skip
