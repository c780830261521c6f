"""What caches hold and how fast they decode: every candidate of a search, and the best of them.

x: bytes of the cache, a logarithm, fewer to the right. y: tokens a second of all requests. So the
best is up and to the right; the line is how far those reach that are shown to be within the limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from typing import TYPE_CHECKING, Any

from narrows.report import units
from narrows.report.labels import Labels, width
from narrows.report.model import Candidate, Frontier
from narrows.report.picture import HEIGHT, INK, MUTED, PAPER, PHASES, RULE, WIDTH, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"dense": INK, "within": PHASES[2], "undecided": PHASES[1], "outside": MUTED}
"""By verdict; shapes and fillings tell them apart without colour."""

MEANING = {
    "within": "within the limits", "undecided": "not decided", "outside": "outside",
}  # fmt: skip

RADIUS = 6.0
"""Points of a mark."""


def unbeaten(found: Frontier) -> list[Candidate]:
    """Of the dense cache and those shown to be within: who holds less or is faster than each other.

    By bytes, the largest cache first.
    """
    known = [c for c in found.candidates if c.verdict == "dense" or proven(c)]
    return sorted(
        (
            c for c in known
            if not any(
                o.bytes <= c.bytes and o.speed >= c.speed
                and (o.bytes < c.bytes or o.speed > c.speed)
                for o in known
            )
        ),
        key=lambda c: -c.bytes,
    )  # fmt: skip


def proven(candidate: Candidate) -> bool:
    """Whether the full reading shows it to be within the limits."""
    return candidate.verdict == "within" and candidate.thorough


def _verdict(candidate: Candidate) -> str:
    """As it is drawn: what a first look alone calls within is not decided."""
    if candidate.verdict == "within" and not candidate.thorough:
        return "undecided"
    return candidate.verdict


def _axes(found: Sequence[Candidate]) -> tuple[Any, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes((0.092, 0.1, 0.903, 0.89))
    axes.patch.set_visible(False)
    sizes, speeds = [c.bytes for c in found], [c.speed for c in found]
    room = max((max(sizes) / min(sizes)) ** 0.08, 1.15)
    axes.set(
        xscale="log", xlim=(max(sizes) * room, min(sizes) / room**2),
        ylim=(max(min(speeds) - 0.25 * (max(speeds) - min(speeds)), 0), 1.18 * max(speeds)),
    )  # fmt: skip
    decades = range(int(log10(min(sizes))) - 1, int(log10(max(sizes))) + 2)
    marks = [
        m * 10.0**d for d in decades for m in (1, 2, 5)
        if min(sizes) / room**2 <= m * 10.0**d <= max(sizes) * room
    ]  # fmt: skip
    axes.xaxis.set_ticks(marks, [units.count_bytes(m).replace(".00", "") for m in marks])
    axes.xaxis.set_ticks([], minor=True)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines:
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=10, labelcolor=MUTED, pad=6)
    axes.set_xlabel("bytes of the cache, fewer to the right", fontsize=10.5, color=MUTED)
    axes.set_ylabel("tokens a second, predicted", fontsize=10.5, color=MUTED)
    return figure, axes


def _mark(axes: Axes, x: float, y: float, shape: str, verdict: str, gid: str = "") -> None:
    filled = verdict in ("within", "dense")
    colour = COLOURS[verdict]
    axes.plot(
        [x], [y], marker=shape, markersize=2 * RADIUS, linestyle="none", clip_on=False,
        markerfacecolor=colour if filled else "none",
        markeredgecolor=PAPER if filled else colour,
        markeredgewidth=0.8 if filled else 1.5, alpha=1.0 if verdict != "outside" else 0.75,
        zorder=4 if filled else 3, gid=gid or None,
    )  # fmt: skip


def _shape(candidate: Candidate) -> str:
    if candidate.verdict == "dense":
        return "D"
    return "s" if candidate.stacked else "o"


def draw(found: Frontier) -> Any:
    """The picture as a matplotlib figure."""
    figure, axes = _axes(found.candidates)
    labels = Labels(axes, INK, MUTED)
    for i, c in enumerate(found.candidates):
        _mark(axes, c.bytes, c.speed, _shape(c), _verdict(c), f"mark-{i}")
        labels.disc(c.bytes, c.speed, RADIUS)
    _edge(axes, labels, unbeaten(found))
    _legend(axes, labels, found)
    best = [found.of(found.best)] if found.best else []
    for c in best:
        told = [
            c.name, f"{units.count_bytes(c.bytes)}, {units.number(c.speed)} tokens a second",
            "the fastest within the limits",
        ]  # fmt: skip
        labels.callout(told, c.bytes, c.speed, RADIUS)
    others = (found.of(n) for n in dict.fromkeys(("dense", found.single, found.stack)) if n)
    for c in others:
        if c not in best:
            labels.mark(c.name, c.bytes, c.speed, RADIUS, COLOURS[_verdict(c)], must=True)
    return figure


def _edge(axes: Axes, labels: Labels, best: Sequence[Candidate]) -> None:
    """How far the unbeaten reach: all that holds more, or is slower, than one of them."""
    (left, _), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    xs, ys = [left], [best[0].speed]
    for c, after in zip(best, [*(b.speed for b in best[1:]), bottom], strict=True):
        xs += [c.bytes, c.bytes]
        ys += [c.speed, after]
    axes.plot(xs, ys, color=PHASES[2], linewidth=1.1, zorder=2.5)
    axes.fill_between(xs, ys, bottom, color=PHASES[2], alpha=0.07, linewidth=0)
    for i in range(len(xs) - 1):
        labels.line((xs[i], xs[i + 1]), (ys[i], ys[i + 1]))


def _legend(axes: Axes, labels: Labels, found: Frontier) -> None:
    """Shapes, then verdicts, of those that are there."""
    shapes = [("D", "dense", "dense")]
    shapes += [("o", "within", "one technique")] if any(
        not c.stacked and c.verdict != "dense" for c in found.candidates) else []  # fmt: skip
    shapes += [("s", "within", "a stack of two")] if any(
        c.stacked for c in found.candidates) else []  # fmt: skip
    seen = {_verdict(c) for c in found.candidates}
    rows = [shapes, [("o", v, told) for v, told in MEANING.items() if v in seen]]
    wide = max(sum(width(text) + 26 for *_, text in row) for row in rows)
    box = labels.corner(wide, 17.0 * len(rows) + 8)
    for i, row in enumerate(rows):
        x, y = box.left + 10, box.top - 14 - 17 * i
        for shape, verdict, text in row:
            dx, dy = labels.data(x, y)
            _mark(axes, dx, dy, shape, verdict)
            labels.text(x + 10, y - 3.5, text, color=COLOURS[verdict] if i else MUTED)
            x += width(text) + 26


def hint(found: Frontier, candidate: Candidate) -> str:
    """What a candidate holds, how fast it is, and what it costs."""
    told = (
        f"{candidate.name}: {units.count_bytes(candidate.bytes)}, "
        f"{units.number(candidate.speed)} tokens a second"
    )
    for name, cost in candidate.costs.items():
        told += (
            f", {name} {units.signed(cost.value)} {units.span(cost.low, cost.high, units.signed)}"
        )
    return f"{told}, {MEANING.get(_verdict(candidate), _verdict(candidate))}"


def svg(found: Frontier, *, standalone: bool = False) -> str:
    """The picture as SVG text; see picture.rendered."""
    limits = ", ".join(f"{n} {units.percent(v)}" for n, v in found.limits.items())
    title = (
        f"Bytes of the cache and tokens a second of {len(found.candidates)} candidates; "
        + (f"{found.best} is the fastest within {limits}." if found.best
           else f"none is shown to be within {limits}.")
    )  # fmt: skip
    hints = {f"mark-{i}": hint(found, c) for i, c in enumerate(found.candidates)}
    return rendered("frontier", lambda: draw(found), title, hints, standalone=standalone)
