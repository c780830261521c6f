"""The roofline of a case (Williams, Waterman and Patterson 2009), one mark for each op class.

x: operations for each byte moved, over all memories. y: operations a second as predicted (the
calibrated seconds, not the limit). Area: share of the seconds. So a technique that halves the
bytes and operations of an op moves its mark nowhere, but shrinks it: a ring around a disc.

The picture is an SVG that takes its colours from the page, so that it reads on white and on dark.
"""

from __future__ import annotations

from math import inf, log10, pi, sqrt
from typing import TYPE_CHECKING, Any

from narrows.core.bound import Bound
from narrows.core.machine import Machine
from narrows.report import units, words
from narrows.report.labels import Labels, width
from narrows.report.picture import (
    INK,
    MUTED,
    PAPER,
    PHASES,
    RULE,
    blank,
    decade,
    drawn,
    named,
    ticks,
)  # fmt: skip
from narrows.report.points import Frame, Point, Roof, calibrated, frame, points, roofs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 2600.0
"""Area in square points of a mark that takes all seconds."""


def _axes(box: Frame) -> tuple[Any, Axes]:
    figure, axes = blank()
    axes.set(xscale="log", yscale="log", xlim=(box.left, box.right), ylim=(box.bottom, box.top))
    ticks(axes.xaxis, box.left, box.right, decade)
    ticks(axes.yaxis, box.bottom, box.top, decade)
    named(axes, "operations for each byte moved (FLOP/byte)", "operations a second (FLOP/s)")
    return figure, axes


class Drawing:
    """One picture while it is drawn: roofs, marks, and labels that keep off both."""

    def __init__(self, machine: Machine, bound: Bound, after: Bound | None, technique: str) -> None:
        self.machine, self.bound, self.after = machine, bound, after
        self.technique = technique or "the technique"
        self.now = points(bound)
        self.then = points(after) if after is not None else []
        self.lines = roofs(machine, bound)
        self.dashed, _ = calibrated(machine, bound)
        self.box = frame([*self.now, *self.then], self.lines)
        phases = (*bound.phases, *(after.phases if after is not None else ()))
        self.colour = {
            name: PHASES[i % len(PHASES)]
            for i, name in enumerate(dict.fromkeys(p.name for p in phases))
        }
        self.figure, self.axes = _axes(self.box)
        self.labels = Labels(self.axes, INK, MUTED)

    def draw(self) -> Any:
        """Everything, from the back to the front; what comes first takes its place first."""
        spans = self._roofs()
        self._calibrated()
        self._bytes_only()
        self._marks()
        self._legend()
        self._roof_labels(spans)
        self._measured()
        self._callout()
        self._mark_labels()
        return self.figure

    def _radius(self, seconds: float) -> float:
        """Points, for an area that is the share of the seconds; never too small to see."""
        return sqrt(max(LARGEST * seconds / self.bound.seconds, 20.0) / pi)

    def _roofs(self) -> list[tuple[Roof, tuple[float, float]]]:
        """Slopes up to the highest roof in use, flat roofs from their ridge on; out of reach: grey.

        Returns what was drawn, and from where to where along x.
        """
        box, lines = self.box, self.lines
        highest = max([r.rate for r in lines if r.flat and r.used]
                      or [r.rate for r in lines if r.flat])  # fmt: skip
        steepest = max([r.rate for r in lines if not r.flat and r.used]
                       or [r.rate for r in lines if not r.flat])  # fmt: skip
        spans: list[tuple[Roof, tuple[float, float]]] = []
        for r in sorted(lines, key=lambda r: not r.used):
            if r.flat:
                xs = (max(r.rate / steepest, box.left), box.right)
                ys = (r.rate, r.rate)
            else:
                xs = (max(box.left, box.bottom / r.rate), min(highest / r.rate, box.right))
                ys = (xs[0] * r.rate, xs[1] * r.rate)
            if ys[1] > box.top / 1.6 or xs[0] >= xs[1]:
                continue
            if r.used:
                self._roof(xs, ys, 1.0 if r.name in self.machine.caches else 1.8)
            spans.append((r, xs))
        corner = min(max(highest / steepest, box.left), box.right)
        edge = [min(x * steepest, highest) for x in (box.left, corner, box.right)]
        self.axes.fill_between(
            [box.left, corner, box.right], edge, box.top, color=RULE, alpha=0.32, linewidth=0
        )
        return spans

    def _calibrated(self) -> None:
        """The same corner as it was measured to be reached, dashed."""
        box = self.box
        flat = next((r.rate for r in self.dashed if r.flat), None)
        slope = next((r.rate for r in self.dashed if not r.flat), None)
        spans: list[tuple[tuple[float, float], tuple[float, float]]] = []
        corner = flat / slope if flat and slope else None
        if slope:
            xs = (max(box.left, box.bottom / slope), corner or min(box.top / slope, box.right))
            spans.append((xs, (xs[0] * slope, xs[1] * slope)))
        if flat:
            spans.append(((corner or box.left, box.right), (flat, flat)))
        for xs, ys in spans:
            self.axes.plot(xs, ys, color=INK, linewidth=1.1, dashes=(4, 3), zorder=2.5, alpha=0.8)
            self.labels.line(xs, ys)

    def _mark(self, x: float, y: float, r: float, p: Point, shape: str, after: bool) -> None:
        """One mark; hollow where it shows what was before a technique."""
        group, name = (self.then, "after") if after else (self.now, "mark")
        filled = after or self.after is None
        colour = self.colour[p.phase]
        self.axes.plot(
            [x], [y], marker=shape, markersize=2 * r, linestyle="none", clip_on=False,
            markerfacecolor=colour if filled else "none",
            markeredgecolor=PAPER if filled else colour,
            markeredgewidth=0.8 if filled else 1.7, alpha=0.9 if filled else 1.0,
            zorder=4 if filled else 4.5, gid=f"{name}-{group.index(p)}",
        )  # fmt: skip

    def _marks(self) -> None:
        """Discs; with a technique, rings for what was before, and a line where a mark moved."""
        for group, after in ((self.now, False), (self.then, True)):
            for p in sorted(group, key=lambda p: -p.seconds):
                if p.flops:
                    x, y = self.box.place(p)
                    self._mark(x, y, self._radius(p.seconds), p, "o", after)
                    self.labels.disc(x, y, self._radius(p.seconds))
        for p, q in self._pairs():
            (x0, y0), (x1, y1) = self.box.place(p), self.box.place(q)
            if p.flops and q.flops and abs(log10(x1 / x0)) + abs(log10(y1 / y0)) > 0.05:
                self.axes.plot([x0, x1], [y0, y1], color=self.colour[p.phase], linewidth=1.0,
                               zorder=3.5)  # fmt: skip

    def _pairs(self) -> list[tuple[Point, Point]]:
        """The same op class before and after."""
        found = {(q.phase, q.op): q for q in self.then}
        return [(p, found[p.phase, p.op]) for p in self.now if (p.phase, p.op) in found]

    def _bytes_only(self) -> None:
        """Op classes without arithmetic have no place on a logarithm: a row at the foot."""
        pure = [p for p in self.now if not p.flops]
        if not pure:
            return
        labels = self.labels
        x, y = labels.frame.left + 8, labels.frame.bottom + 10
        first = x
        after = {(p.phase, p.op): q for p, q in self._pairs()}
        labels.text(x, y - 3.5, "bytes only:", color=MUTED)
        x += width("bytes only:") + 10
        for p in pure:
            dx, dy = labels.data(x, y)
            self._mark(dx, dy, min(self._radius(p.seconds), 7.0), p, "s", False)
            q = after.get((p.phase, p.op))
            if q is not None:
                self._mark(dx, dy, min(self._radius(q.seconds), 7.0), q, "s", True)
            labels.text(x + 9, y - 3.5, words.op(p.op), color=self.colour[p.phase])
            x += width(words.op(p.op)) + 26
        labels.take(first, y - 9, x, y + 9)

    def _legend(self) -> None:
        """Upper left, where no run can be, or lower right, where few are."""
        rows: list[list[tuple[str, str, bool, str]]] = [
            [("o", colour, True, name) for name, colour in self.colour.items()]
        ]
        if self.after is not None:
            rows.append([("o", INK, False, "as it is"), ("o", INK, True, f"with {self.technique}")])
        if any(p.measured_seconds for p in self.bound.phases):
            rows.append([("D", INK, False, "measured, whole phase")])
        if self.dashed:
            rows.append([("--", INK, False, "roof as calibrated")])
        rows.append([("", MUTED, False, "area: share of the seconds")])
        wide = max(sum(width(text) + 26 for *_, text in row) for row in rows)
        box = self.labels.corner(wide, 17.0 * len(rows) + 8)
        for i, row in enumerate(rows):
            x, y = box.left + 10, box.top - 14 - 17 * i
            for shape, colour, filled, text in row:
                x = self._key(x, y, shape, colour, filled, text)

    def _key(self, x: float, y: float, shape: str, colour: str, filled: bool, text: str) -> float:
        """One entry of the legend at pixels; returns where the next one starts."""
        labels = self.labels
        if shape == "--":
            (x0, y0), (x1, _) = labels.data(x - 6, y), labels.data(x + 12, y)
            self.axes.plot([x0, x1], [y0, y0], color=colour, linewidth=1.1, dashes=(4, 3))
        elif shape:
            dx, dy = labels.data(x, y)
            self.axes.plot([dx], [dy], marker=shape, markersize=8, linestyle="none",
                           markerfacecolor=colour if filled else "none",
                           markeredgecolor=colour, markeredgewidth=1.4)  # fmt: skip
        start = x - 5 if not shape else x + (17 if shape == "--" else 10)
        labels.text(start, y - 3.5, text, color=colour if shape == "o" else MUTED)
        return start + width(text) + 16

    def _roof(self, xs: tuple[float, float], ys: tuple[float, float], wide: float) -> None:
        colour = INK if wide >= 1 else MUTED
        self.axes.plot(xs, ys, color=colour, linewidth=wide, zorder=2, solid_capstyle="round")
        self.labels.line(xs, ys)

    def _roof_labels(self, spans: list[tuple[Roof, tuple[float, float]]]) -> None:
        """Names and rates; a roof that is not in use is drawn only where its name has room."""
        for r, xs in spans:
            text = f"{r.name}\u2002{units.si(r.rate, 'FLOP/s' if r.flat else 'B/s')}"
            ys = (r.rate, r.rate) if r.flat else (xs[0] * r.rate, xs[1] * r.rate)
            label = self.labels.flat if r.flat else self.labels.slope
            if label(text, xs, r.rate, r.used) and not r.used:
                self._roof(xs, ys, 0.8)

    def _measured(self) -> None:
        """A diamond for each phase that was really run: all its operations in those seconds."""
        for i, phase in enumerate(self.bound.phases):
            moved = sum(phase.bytes.values())
            if phase.measured_seconds is None or not phase.flops or not moved:
                continue
            x, y = phase.flops / moved, phase.flops / phase.measured_seconds
            self.axes.plot(
                [x], [y], marker="D", markersize=7, markerfacecolor=PAPER, linestyle="none",
                markeredgecolor=self.colour[phase.name], markeredgewidth=1.8, zorder=5,
                gid=f"measured-{i}",
            )  # fmt: skip
            self.labels.disc(x, y, 6)

    def _callout(self) -> None:
        """A box with a line to the op class that the narrowest resource holds up most."""
        narrow = self.bound.narrowest
        _, phase, op = max(
            (row.seconds, phase.name, row.op)
            for phase in self.bound.phases
            for row in phase.rows
            if row.resource == narrow
        )
        worst = next(p for p in self.now if (p.phase, p.op) == (phase, op))
        part = units.percent(worst.seconds / self.bound.seconds)
        rows = [
            f"narrowest: {words.resource(narrow, self.machine)}",
            f"{worst.phase}, {words.op(worst.op)}: {part} of all seconds",
        ]
        x, y = self.box.place(worst)
        self.labels.callout(rows, x, y, self._radius(worst.seconds))

    def _mark_labels(self) -> None:
        for p in sorted(self.now, key=lambda p: -p.seconds):
            if p.flops:
                x, y = self.box.place(p)
                self.labels.mark(
                    words.op(p.op), x, y, self._radius(p.seconds), self.colour[p.phase],
                    must=p.seconds >= 0.03 * self.bound.seconds,
                )  # fmt: skip


def _hints(bound: Bound, prefix: str) -> dict[str, str]:
    """What a pointer over a mark reads, by the id of the mark."""
    hints: dict[str, str] = {}
    for i, p in enumerate(points(bound)):
        intensity = "no arithmetic" if not p.flops else f"{units.figures(p.intensity)} FLOP/byte"
        if p.intensity == inf:
            intensity = "no bytes moved"
        hints[f"{prefix}-{i}"] = (
            f"{p.phase}, {words.op(p.op)}: {units.seconds(p.seconds)} "
            f"({units.percent(p.seconds / bound.seconds)}), {intensity}, "
            f"{units.si(p.speed, 'FLOP/s')}, held up by {words.resource(p.narrowest)}"
        )
    return hints


def describe(machine: Machine, bound: Bound, after: Bound | None = None) -> str:
    """The picture in a sentence or two, for those who do not see it."""
    main = max(points(bound), key=lambda p: p.seconds)
    text = (
        f"Roofline of {bound.workload} on {bound.machine}. {len(points(bound))} op classes; the "
        f"largest is {words.op(main.op)} in {main.phase} with "
        f"{units.percent(main.seconds / bound.seconds)} of the seconds, held up by "
        f"{words.resource(main.narrowest, machine)}."
    )
    if after is not None:
        text += f" Filled marks: with the technique, {units.seconds(after.seconds)} in all."
    return text


def svg(
    machine: Machine,
    bound: Bound,
    after: Bound | None = None,
    technique: str = "",
    *,
    standalone: bool = False,
) -> str:
    """The picture as SVG text.

    after: the bound with a technique, named in the legend. standalone: with its own colours, for
    light and for dark pages; without, it takes those of the page it stands in.
    """
    hints = {**_hints(bound, "mark"), **(_hints(after, "after") if after else {})}
    return drawn(
        lambda: Drawing(machine, bound, after, technique).draw(), "roofline",
        describe(machine, bound, after), hints, ("mark-", "after-", "measured-"), standalone,
    )  # fmt: skip
