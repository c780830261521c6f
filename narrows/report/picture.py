"""What the pictures of a report share: size, colours, axes, and how a figure becomes an SVG.

A picture takes its colours from the page, so that it reads on white and on dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from html import escape
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from narrows.core.errors import NarrowsError
from narrows.report import units

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 9.4, 5.7
"""Inches at 72 points; the page scales it."""

INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
PHASES = ("#0a0101", "#0a0202", "#0a0303", "#0a0404", "#0a0505")
"""Stand-ins that become the page's colours: var(--ink), ..., var(--phase-1), ..."""

VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)",
    **{colour: f"var(--phase-{i + 1})" for i, colour in enumerate(PHASES)},
}  # fmt: skip

LIGHT = {
    "ink": "#1b1f24", "muted": "#5d6670", "rule": "#d9dee3", "paper": "#ffffff",
    "phase-1": "#0072b2", "phase-2": "#d55e00", "phase-3": "#007d5c", "phase-4": "#a6518a",
    "phase-5": "#8a6d00",
}  # fmt: skip
DARK = {
    "ink": "#e8eaed", "muted": "#9aa4ae", "rule": "#333a42", "paper": "#14171b",
    "phase-1": "#56b4e9", "phase-2": "#f08a3c", "phase-3": "#35c49a", "phase-4": "#dd94c4",
    "phase-5": "#e0c341",
}  # fmt: skip
"""Hues of Okabe and Ito (2008), told apart with every colour vision; lighter on dark."""


def ticks(axis: Any, low: float, high: float, show: Any) -> None:
    """A tick for each decade, or fewer where there are many."""
    first, last = ceil(log10(low)), floor(log10(high))
    step = max(1, round((last - first + 1) / 8))
    values = [10.0**d for d in range(first, last + 1, step)]
    axis.set_ticks(values, [show(v) for v in values])
    axis.set_ticks([], minor=True)


def decade(value: float) -> str:
    """A power of ten in short: 0.01, 1, 1000, 10 G."""
    if 1e-4 <= value <= 1e4:
        return f"{value:g}"
    number, _, prefix = units.si(value, "").partition(" ")
    return f"{float(number):g} {prefix}"


def blank() -> tuple[Any, Axes]:
    """A figure and its axes, with nothing but room for labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes((0.092, 0.1, 0.903, 0.89))
    axes.patch.set_visible(False)
    return figure, axes


def named(axes: Axes, x: str, y: str) -> None:
    """Names of the axes, and a grid instead of a frame; after the scales are set."""
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines:
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=10, labelcolor=MUTED, pad=6)
    axes.set_xlabel(x, fontsize=10.5, color=MUTED)
    axes.set_ylabel(y, fontsize=10.5, color=MUTED)


def drawn(
    draw: Callable[[], Any], kind: str, title: str, hints: Mapping[str, str],
    kept: Iterable[str], standalone: bool = False,
) -> str:  # fmt: skip
    """A figure as SVG text.

    draw: makes the figure. kind: class of the element. title: what it shows, in words. hints: what
    a pointer over a mark reads, by the mark's gid. kept: how names begin that stay. standalone:
    with its own colours, for light and for dark pages; else it takes those of its page.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
    except ModuleNotFoundError as error:
        raise NarrowsError(
            f"the {kind} picture needs matplotlib: pip install 'narrows[report]'"
        ) from error
    chosen: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"narrows {kind}",  # names of two pictures in a page never clash
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(chosen):
        buffer = io.StringIO()
        FigureCanvasSVG(draw()).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    # Text is set in the page's font: ours only measured it.
    text = re.sub(r"font(?:-family)?: [^;\"]*'[^;\"]*;?", _size, text)
    # Names that nothing refers to would clash with those of another picture in the page.
    begins = tuple(kept)

    def own(name: re.Match[str]) -> str:
        return name[0] if name[1].startswith(begins) or f"#{name[1]}" in text else ""

    text = re.sub(r' id="([^"]*)"', own, text)
    for gid, hint in hints.items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(hint)}</title>', 1)
    head = (
        f'<svg class="{kind}" role="img" viewBox="0 0 {WIDTH * 72:g} {HEIGHT * 72:g}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f"<title>{escape(title)}</title>"
    )
    style = (
        f".{kind} text{{paint-order:stroke;stroke:var(--paper);stroke-width:3px;"
        "stroke-linejoin:round}"
    )
    if standalone:
        style += colours(f".{kind}")
        style += (
            f".{kind}{{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',"
            "sans-serif}"
        )
    return f"{head}<style>{style}</style>{text[text.index('>') + 1 :]}"


def _size(style: re.Match[str]) -> str:
    """Of a font, only its size."""
    size = re.search(r"[\d.]+px", style[0])
    return f"font-size: {size[0]};" if size else ""


def colours(selector: str) -> str:
    """CSS that gives the pictures their colours, for light and for dark."""

    def block(chosen: Mapping[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in chosen.items())

    dark = f"@media (prefers-color-scheme:dark){{{selector}{{{block(DARK)}}}}}"
    return f"{selector}{{{block(LIGHT)}}}{dark}"
